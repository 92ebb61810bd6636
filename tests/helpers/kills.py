"""Kill work at every moment, in forked children, to see what it leaves on disk.

    for number in range(1, count_changes(save, folder) + 1):
        assert kill_at_change(number, save, folder)
        ...  # look at the folder

A change is the opening of a file to write, a flush to disk, a rename, a removal or a new folder.
Python announces all but the flush to audit hooks before it happens, whatever function asks for it.
The child is killed by SIGKILL, so nothing is cleaned up. Forking is fast because everything is
imported; the work must not need threads that the parent has started.
"""

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

#: A child that hangs is killed after this time, and the test fails.
SECONDS = 60

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def count_changes(work: Callable[[], object], folder: Path) -> int:
    """Return the number of changes below a folder that some work makes when it is left alone."""
    read, write = os.pipe()
    child = _fork(lambda: os.write(write, str(_watched(work, folder, 0)).encode()))
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    assert _wait(child) == 0, "the work failed; its traceback is above"
    return int(text)


def kill_at_change(number: int, work: Callable[[], object], folder: Path) -> bool:
    """Run work and kill it right before its change of this number. Return whether it got there."""
    code = _wait(_fork(lambda: _watched(work, folder, number)))
    assert code in {0, -signal.SIGKILL}, "the work failed; its traceback is above"
    return code != 0


def kill_after(seconds: float, work: Callable[[], object]) -> bool:
    """Run work and kill it after a time. Return whether it was killed before its end."""
    child = _fork(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)  # until it is waited for, its number belongs to no other
    code = _wait(child)
    assert code in {0, -signal.SIGKILL}, "the work failed; its traceback is above"
    return code != 0


def _watched(work: Callable[[], object], folder: Path, kill_at: int) -> int:
    root, changes, original_fsync = str(folder), 0, os.fsync

    def change() -> None:
        nonlocal changes
        changes += 1
        if changes == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
        # A path that is not absolute belongs to a folder that shutil has opened.
        if (writes or event in _CHANGES) and any(
            path.startswith(root) or not Path(path).is_absolute() for path in _paths(arguments)
        ):
            change()

    def fsync(handle: int) -> None:
        change()
        original_fsync(handle)

    os.fsync = fsync
    sys.addaudithook(hook)  # it cannot be removed, but this process ends soon
    work()
    return changes


def _paths(arguments: tuple[Any, ...]) -> list[str]:
    return [os.fsdecode(a) for a in arguments[:2] if isinstance(a, str | bytes | os.PathLike)]


def _fork(work: Callable[[], object]) -> int:
    with warnings.catch_warnings():
        # Newer Pythons warn of threads: torch's, which the work does not use.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int) -> int:
    end = time.monotonic() + SECONDS
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"the work did not end in {SECONDS} seconds")
        time.sleep(0.001)
