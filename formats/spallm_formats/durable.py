"""Write files that survive a crash: flush to disk, then rename into place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is complete or absent, even after a power failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file beside `path` that replaces it, in one step, when the block ends.

    If the block raises, `path` stays as it was. If `path` is a link, the link is replaced, and not
    the file that it leads to. One process at a time may replace a file.

    Args:
        path: The file. Its folder must exist.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # what a killed process left, or a link that was put there
    file = temporary.open("xb")  # "x" follows no link
    try:
        with file:
            yield file
            flush(file)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def flush(file: BinaryIO) -> None:
    """Flush a file to disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Flush renames in a folder to disk, on systems that can do that."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
