"""Kernels touch nothing outside of their tensors: one byte too far would end the program."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import guard_pages


def run(what):
    paths = [str(Path(guard_pages.__file__).parents[1]), *filter(None, sys.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-X", "faulthandler", guard_pages.__file__, what]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_kernels_touch_nothing_outside_of_their_tensors(unit):
    done = run(unit)
    last = done.stdout.splitlines()[-3:]
    assert done.returncode == 0, f"ended with {done.returncode} in {last}:\n{done.stderr[-3000:]}"
    assert last[-1] == "done"


@pytest.mark.parametrize(("what", "last"), [("beyond", "byte 5 of 5"), ("before", "byte -1 of 5")])
def test_one_byte_too_far_ends_the_program(what, last):
    done = run(what)
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS)
    assert done.stdout.splitlines()[-1] == last
