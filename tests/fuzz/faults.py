"""Commit every fault that the suite looks for, to see that it finds them.

A case of the family "faults" has a kind that says what its check does. The cases are only run by
`test_children.py`.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spallm_convert import SpallmError

from .findings import Findings
from .mutations_files import outside

FAMILY = "faults"


def compute(folder: Path, findings: Findings) -> None:
    """Compute for ever."""
    while True:
        pass


def wait(folder: Path, findings: Findings) -> None:
    """Wait for ever."""
    time.sleep(10**6)


def die(folder: Path, findings: Findings) -> None:
    """End by a signal."""
    os.kill(os.getpid(), signal.SIGSEGV)


def take_memory(folder: Path, findings: Findings) -> None:
    """Take more memory than a case may, and give it back."""
    b"x" * (400 << 20)


def raise_another_error(folder: Path, findings: Findings) -> None:
    """Raise an error that is not ours."""
    findings.attempt("fault", lambda: {}["key"])


def say_too_much(folder: Path, findings: Findings) -> None:
    """Raise an error of ours whose message is long."""

    class LongError(SpallmError):
        def __str__(self) -> str:
            return "x" * 5_000

    def refuse() -> None:
        raise LongError("")

    findings.attempt("fault", refuse)


def change_files(folder: Path, findings: Findings) -> None:
    """Change a file of the user's."""
    (outside(folder) / "thesis.txt").write_text("lost")


def nothing(folder: Path, findings: Findings) -> None:
    """Break no rule."""


FAULTS: dict[str, tuple[Callable[[Path, Findings], None], str]] = {
    "compute": (compute, "hangs"),
    "wait": (wait, "hangs"),
    "die": (die, "dies"),
    "memory": (take_memory, "memory"),
    "error": (raise_another_error, "fault raises KeyError"),
    "message": (say_too_much, "fault: long message"),
    "files": (change_files, "files outside are changed"),
    "nothing": (nothing, ""),
}


def check_faults(spoiled: Path, rng: random.Random, bases: Any) -> Findings:
    """Commit the fault that the spoiled file names."""
    findings = Findings()
    fault, _ = FAULTS[spoiled.read_text()]
    fault(spoiled, findings)
    findings.outcome = "accepted"
    return findings


def _writes(name: str) -> Callable[[Path, random.Random], None]:
    def spoil(path: Path, rng: random.Random) -> None:
        path.write_text(name)

    return spoil


MUTATIONS = {name: _writes(name) for name in FAULTS}
