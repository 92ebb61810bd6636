"""Killed conversions of all kinds: see `helpers/kill_conversions.py`, which checks every kill."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "helpers" / "kill_conversions.py"
MODES = ["plain", "calibrated", "healed", "chosen", "replaced"]


def kills(source, text, root, mode, count):
    command = [sys.executable, SCRIPT, source, text, root, mode, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize(("mode", "count"), [("replaced", 2), ("healed", 1)])
def test_kills_at_a_few_changes(source, text, tmp_path, mode, count):
    assert kills(source, text, tmp_path, mode, count) > count


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_kills_at_many_changes(source, text, tmp_path, mode):
    """With 0 in place of 10, every change is tried, which takes some minutes."""
    assert kills(source, text, tmp_path, mode, 10) > 10
