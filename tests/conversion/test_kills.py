"""Killed conversions of all kinds: see `helpers/kill_conversions.py`, which checks every kill."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "helpers" / "kill_conversions.py"
MODES = ["plain", "calibrated", "healed", "chosen", "replaced", "again"]


def kills(source, text, root, mode, count):
    command = [sys.executable, SCRIPT, source, text, root, mode, str(count)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # with that of `helpers`
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_kills_at_many_changes(source, text, tmp_path, mode):
    """With 0 in place of 2, every change is tried, which takes some minutes."""
    assert kills(source, text, tmp_path, mode, 2) >= 2
