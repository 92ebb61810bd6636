"""Killed conversions of all kinds: see `helpers/kill_conversions.py`, which checks every kill."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "helpers" / "kill_conversions.py"
MODES = ["plain", "normal", "calibrated", "healed", "chosen", "replaced", "again"]
#: Kills of each kind in every mode; with 0, every change on disk is tried, which takes minutes.
COUNT = 3


@pytest.mark.slow
def test_killed_conversions_lose_nothing_and_resume_to_the_same_bytes(source, text, tmp_path):
    command = [sys.executable, SCRIPT, source, text, tmp_path, str(COUNT), *MODES]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # with that of `helpers`
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = dict(line.split() for line in done.stdout.splitlines())
    assert list(kills) == MODES
    assert all(int(count) > COUNT for count in kills.values()), kills
