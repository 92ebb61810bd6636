"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(name: str | os.PathLike[str]) -> Path:
    """A path in which ~ and ~user stand for home folders; ~ of nobody stays, as in a shell."""
    return Path(os.path.expanduser(name))  # noqa: PTH111  the one of pathlib raises for nobody
