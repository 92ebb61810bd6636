"""Check an output folder and the work folder of conversions in it, `<folder>/.spallm-partial/`.

The work folder is emptied and written to without questions, so everything in it must be a plain
file or a folder. A link in it could lead to files of the user's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from .errors import FormatError, SpallmError
from .files import read_json
from .text import shown

PARTIAL_FOLDER = ".spallm-partial"
#: What the work folder holds: what is converted and how, the files of the checkpoint, the list of
#: them when all are written, the lock, and intermediate files.
PLAN_FILE = "plan.json"
FILES = "files"
MARKER = "complete.json"
LOCK = "lock"
SCRATCH = "scratch"
#: Errors of file systems without locks, such as some network file systems. Two runs into one folder
#: are not kept apart there.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}
#: The most bytes of a name in a folder, and of a path, on common file systems.
_MAX_NAME, _MAX_PATH = 255, 1024


def check_output_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Check that a checkpoint may be written into a folder.

    Args:
        folder: Output folder.
        resume: Whether an unfinished conversion in it is continued.
        overwrite: Whether its contents are replaced.

    Raises:
        SpallmError: If it is a file, holds something that neither option covers, or its work folder
            holds a link.
    """
    if folder.exists() and not folder.is_dir():
        raise SpallmError(f"output {folder} is a file, expected a folder or a new name")
    _check_plain(folder / PARTIAL_FOLDER)
    if not folder.exists() or overwrite:
        return
    if is_unfinished(folder):
        if not resume:
            locked(folder).release()  # raises an error if another process is at it
            raise SpallmError(
                f"output folder {folder} holds an unfinished conversion: use --resume to "
                f"continue it, or --overwrite to start again"
            )
    elif any(path.name != PARTIAL_FOLDER for path in folder.iterdir()):
        nothing = " and holds no conversion to resume" if resume else ""
        raise SpallmError(
            f"output folder {folder} is not empty{nothing}: use --overwrite to replace it"
        )


def is_unfinished(folder: Path) -> bool:
    """Return whether an interrupted run left work in a folder that can be continued."""
    return any((folder / PARTIAL_FOLDER / name).exists() for name in (FILES, MARKER))


def remove_leftovers(folder: Path) -> None:
    """Remove what a run killed in its very last step left beside a complete checkpoint."""
    if not is_unfinished(folder):
        shutil.rmtree(folder / PARTIAL_FOLDER, ignore_errors=True)


def locked(folder: Path) -> BaseFileLock:
    """Lock the work folder of an output folder.

    The system gives up the lock when the process ends, however it ends.

    Args:
        folder: Output folder. Its work folder exists.

    Returns:
        The lock, which is held.

    Raises:
        SpallmError: If another process holds it.
    """
    # A soft lock, which is only a file, would outlive a process that is killed.
    lock = FileLock(folder / PARTIAL_FOLDER / LOCK, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise SpallmError(
            f"another process is writing to {folder}: wait for it, or use another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return lock


def read_work_file(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object from the work folder of an output folder.

    Args:
        folder: Output folder.
        name: Name of the file in the work folder.

    Returns:
        The object.

    Raises:
        SpallmError: If the file is damaged.
    """
    try:
        document = read_json(folder / PARTIAL_FOLDER / name)
    except FormatError as error:
        raise _damaged(folder, str(error)) from error
    if not isinstance(document, dict):
        raise _damaged(folder, f"{name} holds {shown(document)}")
    return document


def inside(folder: Path, name: Any) -> str:
    """Return a name from a work file, a path below the output folder.

    Raises:
        SpallmError: If it is anything else.
    """
    if not isinstance(name, str) or not is_inside(name):
        raise _damaged(folder, f"{shown(name)} is not a path inside the output folder")
    return name


def is_inside(name: str) -> bool:
    """Return whether a name read from a file is a path below a folder, on any system."""
    encoded = name.encode("utf-8", "surrogatepass")
    return (
        bool(name)
        and "\0" not in name
        and len(encoded) < _MAX_PATH
        and all(len(part) <= _MAX_NAME for part in encoded.split(b"/"))
        and not any(
            path.anchor or ".." in path.parts
            for path in (PurePosixPath(name), PureWindowsPath(name))
        )
    )


def clear(folder: Path, *, keep: set[str]) -> None:
    """Empty a folder, except for the files `keep`."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()


def remove_work_folder(folder: Path) -> None:
    """Remove the work folder in an order that a later run understands if this one is killed.

    The marker is removed before the plan that it belongs to, and the lock last.
    """
    partial = folder / PARTIAL_FOLDER
    with contextlib.suppress(OSError):
        clear(partial, keep={MARKER, PLAN_FILE, LOCK})
        for name in (MARKER, PLAN_FILE, LOCK):
            (partial / name).unlink(missing_ok=True)
        partial.rmdir()


def _check_plain(partial: Path) -> None:
    """Raise SpallmError if a work folder is or holds anything but files and folders."""
    found = [partial] if os.path.lexists(partial) else []
    while found:
        path = found.pop()
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            found += path.iterdir()
        elif path == partial or not stat.S_ISREG(mode):
            kind = "a link" if stat.S_ISLNK(mode) else "not a plain file"
            raise SpallmError(
                f"{path} is {kind}, expected files of spallm-convert alone: remove "
                f"{path if path == partial else partial}"
            )


def _damaged(folder: Path, found: str) -> SpallmError:
    return SpallmError(
        f"{folder}: the unfinished conversion in it is damaged ({found}); use --overwrite to start "
        f"again"
    )
