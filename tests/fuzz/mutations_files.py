"""Put other things in the place of files: links, pipes, folders, devices, files of no size.

Every family has these kinds. The sentinel folder lies beside each spoiled folder, as files of the
user's that must stay as they are.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

from .cases import SHARES, add_kind
from .spoiling import flipped, grown, truncated

SENTINEL = "sentinel"
_HUGE = 1 << 29


def files(folder: Path) -> list[Path]:
    """Return the files of a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def pick(folder: Path, rng: random.Random) -> Path:
    """Choose a file of a folder, or the file itself."""
    return folder if folder.is_file() else rng.choice(files(folder))


def removed(path: Path, rng: random.Random) -> None:
    """Remove it."""
    path.unlink()


def emptied(path: Path, rng: random.Random) -> None:
    """Leave no bytes in it."""
    path.write_bytes(b"")


def a_folder(path: Path, rng: random.Random) -> None:
    """Put a folder in its place."""
    path.unlink()
    path.mkdir()
    if rng.random() < 0.5:
        (path / "inside.json").write_text("{}")


def a_pipe(path: Path, rng: random.Random) -> None:
    """Put a named pipe in its place: opening it waits for a writer."""
    path.unlink()
    os.mkfifo(path)


def a_socket(path: Path, rng: random.Random) -> None:
    """Put a socket in its place."""
    path.unlink()
    here = Path.cwd()
    os.chdir(path.parent)  # paths of sockets must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def a_device(path: Path, rng: random.Random) -> None:
    """Put a link to a device in its place: one has no end, one has no bytes."""
    path.unlink()
    path.symlink_to(rng.choice(("/dev/zero", "/dev/null")))


def a_dangling_link(path: Path, rng: random.Random) -> None:
    """Put a link to nothing, or to itself, in its place."""
    path.unlink()
    path.symlink_to(rng.choice((path.parent / "nowhere", path.name, f"../{SENTINEL}/absent")))


def a_link_outside(path: Path, rng: random.Random) -> None:
    """Put a link to a file of the user's in its place."""
    path.unlink()
    path.symlink_to(outside(path) / rng.choice(("thesis.txt", "settings.json")))


def a_link_to_itself_moved(path: Path, rng: random.Random) -> None:
    """Move it out of the folder and leave a link, as the cache of the Hub does."""
    moved = outside(path).parent / "blobs"
    moved.mkdir(exist_ok=True)
    path.rename(moved / path.name)
    path.symlink_to(moved / path.name)


def sparse(path: Path, rng: random.Random) -> None:
    """Make it half a gibibyte long, with almost nothing on the disk."""
    os.truncate(path, _HUGE)


def two_swapped(path: Path, rng: random.Random) -> None:
    """Give it the contents of a file beside it."""
    other = rng.choice(files(path.parent))
    path.write_bytes(other.read_bytes())


def _in_place(change: Callable[[bytes, random.Random], bytes]) -> Callable[..., None]:
    def spoil(path: Path, rng: random.Random) -> None:
        path.write_bytes(change(path.read_bytes(), rng))

    return spoil


KINDS_OF_FILES: dict[str, Callable[[Path, random.Random], None]] = {
    "removed": removed,
    "emptied": emptied,
    "a folder": a_folder,
    "a pipe": a_pipe,
    "a socket": a_socket,
    "a device": a_device,
    "a dangling link": a_dangling_link,
    "a link outside": a_link_outside,
    "moved and linked": a_link_to_itself_moved,
    "sparse": sparse,
    "contents of another": two_swapped,
    "flipped": _in_place(flipped),
    "truncated": _in_place(truncated),
    "grown": _in_place(grown),
}


def outside(path: Path) -> Path:
    """Return the sentinel folder of the case that a path belongs to."""
    return next(up / SENTINEL for up in path.parents if (up / SENTINEL).is_dir())


def _somewhere(change: Callable[[Path, random.Random], None]) -> Callable[..., None]:
    return lambda folder, rng: change(pick(folder, rng), rng)


for _family in SHARES:
    for _name, _change in KINDS_OF_FILES.items():
        add_kind(_family, f"file: {_name}", _somewhere(_change))
