"""Read files that may be anything: regular files only, and JSON only within limits of memory.

A name in a folder may be a pipe or a device, which would be read for ever. A JSON document may need
fifty times its size in memory: `{"a":0}` is a dict of some hundred bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections import Counter
from io import BufferedReader
from pathlib import Path
from typing import Any

from .errors import FormatError
from .text import shown, summary

#: The largest JSON document that is read. The index of a model with 100,000 experts has 15 MB.
MAX_JSON_BYTES = 1 << 25
#: Memory that a document may need: this many times its size, plus a constant.
_MEMORY_FACTOR, _MEMORY_CONSTANT = 12, 1 << 24
#: About what a parsed object, list, element and half a string take, in bytes, by what marks it.
_COSTS = {b"{": 300, b"[": 64, b",": 40, b'"': 30}
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading. A link to a regular file is followed.

    Args:
        path: The file.

    Returns:
        The open file.

    Raises:
        FormatError: If it is a pipe, a device or a folder.
        OSError: If it does not exist or may not be read.
    """
    _check_regular(path, path.stat())  # opening a device may do something, and a socket fails
    # Without O_NONBLOCK, opening a pipe waits for a writer. Regular files ignore the flag.
    handle = os.open(path, _OPEN_FLAGS | getattr(os, "O_NONBLOCK", 0))
    try:
        _check_regular(path, os.fstat(handle))  # another file may have taken its place
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
        raise FormatError(f"{path.name}: {kind}, expected a regular file; remove it")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a regular file, 64 hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_small(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Read a regular file that should be small.

    Args:
        path: The file.
        limit: The most bytes that it may have.

    Returns:
        Its contents.

    Raises:
        FormatError: If it is larger, not a regular file, or a git-lfs pointer.
        OSError: If it does not exist or cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FormatError(f"{path.name}: larger than {limit:,} bytes, the most that is read")
    refuse_pointer(data, path.name)
    return data


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file, as `load_json` parses it.

    Args:
        path: The file.
        limit: The most bytes that it may have.

    Returns:
        The parsed document.

    Raises:
        FormatError: If `read_small` or `load_json` refuses it.
        OSError: If it does not exist or cannot be read.
    """
    return load_json(read_small(path, limit), path.name)


def refuse_pointer(start: bytes, name: str) -> None:
    """Raise FormatError if a file is the small text that git-lfs puts in the place of a large file.

    Args:
        start: The first bytes of the file, at least 40 if it has as many.
        name: Name of the file.
    """
    if start.startswith(_LFS_POINTER):
        raise FormatError(
            f"{name}: a git-lfs pointer in place of the file; get it with `git lfs pull` in its "
            f"folder"
        )


def refuse_costly_json(text: bytes, name: str) -> None:
    """Raise FormatError if a JSON text would take much more memory than its size when parsed.

    Args:
        text: UTF-8 text.
        name: Name for error messages.
    """
    needed = sum(cost * text.count(mark) for mark, cost in _COSTS.items())
    if needed > _MEMORY_FACTOR * len(text) + _MEMORY_CONSTANT:
        raise FormatError(
            f"{name}: {len(text):,} bytes of JSON would take about {needed:,} bytes of memory"
        )


def load_json(text: bytes, name: str) -> Any:
    """Parse JSON within bounds of memory, refusing repeated keys and lone surrogates.

    Args:
        text: UTF-8 text.
        name: Name for error messages.

    Returns:
        The parsed document.

    Raises:
        FormatError: If it is not valid JSON, repeats a key, holds half of a surrogate pair, or
            would take much more memory than its size.
    """
    refuse_costly_json(text, name)

    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            repeated = [shown(key) for key, count in counts.items() if count > 1]
            raise FormatError(f"{name}: repeated keys in JSON: {summary(sorted(repeated), ', ')}")
        return document

    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=no_repeats)
        if _SURROGATE.search(text):
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: not valid JSON ({error})") from error
    return document


def to_json(document: Any) -> bytes:
    """Write JSON as all of this project does: two spaces, UTF-8, keys in the given order.

    Args:
        document: Any JSON document.

    Returns:
        The text, ending in a line feed.
    """
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
