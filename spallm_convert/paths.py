"""Read paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(name: str | os.PathLike[str]) -> Path:
    """Expand ~ and ~user to home folders; keep ~user if there is no such user, as a shell does."""
    return Path(os.path.expanduser(name))  # noqa: PTH111  pathlib's raises for an unknown user


def name_as_text(name: str) -> str:
    """Return the name of a file as Unicode: bytes that are not UTF-8 are written as `\\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
