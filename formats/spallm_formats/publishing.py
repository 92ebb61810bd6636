"""Move the files of a complete checkpoint from the work folder up into the output folder.

The process may be killed at any moment, and the next run moves the rest. `config.json` is removed
first and moved last, so the folder is never a model that is half old and half new.

Nothing of the user's is lost: of an older checkpoint, only regular files are removed that have the
hash which its conversion recorded. Nothing is written or removed through a link to another folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from .durable import flush_folder, write_atomic
from .errors import FormatError, SpallmError
from .files import sha256, to_json
from .layout import INDEX_FILE, SHARD_NAME
from .text import shown, summary
from .work_folder import FILES, MARKER, PARTIAL_FOLDER, inside, read_work_file, remove_work_folder

CONFIG_FILE = "config.json"


def check_replaceable(folder: Path, names: Iterable[str], older: Mapping[str, str]) -> None:
    """Check that a checkpoint can take the place of what is in a folder.

    Args:
        folder: Output folder.
        names: Files of the new checkpoint.
        older: SHA-256 of the files of an older checkpoint in the folder, by name.

    Raises:
        SpallmError: If the folder holds other weights, which would be read together with the new
            ones, or a folder or link where a file or folder must be.
    """
    new = set(names)
    problems = [problem for name in sorted(new) if (problem := _in_the_way(folder, name))]
    found = (path.name for path in folder.iterdir()) if folder.exists() else ()
    weights = {name for name in found if SHARD_NAME.fullmatch(name) or name == INDEX_FILE}
    strange = sorted(
        name for name in weights - new if not _is_unchanged(folder, name, older.get(name))
    )
    if strange:
        problems.append(
            f"{summary(strange, ', ')} there, which this tool did not write or which changed since"
        )
    if problems:
        raise SpallmError(
            f"{folder} cannot be overwritten: {summary(problems)}; move that away, or choose "
            f"another folder"
        )


def publish(folder: Path, names: list[str], older: Mapping[str, str]) -> None:
    """Move files from the work folder up into the output folder.

    Args:
        folder: Output folder.
        names: Files to move, including config.json.
        older: SHA-256 of the files of an older checkpoint in the folder, by name. They are removed,
            unless they are replaced or have changed.

    Raises:
        SpallmError: As in `check_replaceable`. Then nothing has been moved.
    """
    assert CONFIG_FILE in names
    check_replaceable(folder, names, older)
    partial = folder / PARTIAL_FOLDER
    obsolete = {name: older[name] for name in sorted(older.keys() - set(names))}
    flush_folder(partial / FILES)  # before the marker, which says that all files are written
    write_atomic(partial / MARKER, to_json({"names": names, "obsolete": obsolete}))
    finish_publishing(folder)


def finish_publishing(folder: Path) -> None:
    """Move up the files that are still to be moved; a second call does nothing more.

    Args:
        folder: Output folder.

    Raises:
        SpallmError: If a file of an interrupted run is missing, or the list of files is damaged.
    """
    names, obsolete = _read_marker(folder)
    files = folder / PARTIAL_FOLDER / FILES
    staged = [name for name in [*names, CONFIG_FILE] if (files / name).exists()]
    lost = [n for n in names if n not in staged and not (folder / n).exists()]
    if lost:
        raise SpallmError(
            f"{folder}: {summary(lost, ', ')} of the interrupted conversion cannot be found; use "
            f"--overwrite to start again"
        )
    if problems := [problem for name in staged if (problem := _in_the_way(folder, name))]:
        raise SpallmError(f"{folder}: {summary(problems)}; move that away, then use --resume")
    if staged:
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        for name, digest in obsolete.items():
            if _is_unchanged(folder, name, digest):
                (folder / name).unlink()
    for name in staged:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).replace(folder / name)
        flush_folder((folder / name).parent)
    remove_work_folder(folder)


def _read_marker(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the files to move, without config.json, and the ones to remove with their hashes."""
    todo = read_work_file(folder, MARKER)
    names, obsolete = todo.get("names"), todo.get("obsolete")
    if not isinstance(names, list) or not isinstance(obsolete, dict):
        raise SpallmError(f"{folder}: {MARKER} is damaged; use --overwrite to start again")
    checked = [inside(folder, name) for name in names]
    return [name for name in checked if name != CONFIG_FILE], {
        inside(folder, name): str(digest) for name, digest in obsolete.items()
    }


def _is_unchanged(folder: Path, name: str, digest: str | None) -> bool:
    """Return whether a file is regular, not reached through a link, and has this SHA-256."""
    path = folder / name
    if digest is None or path.is_symlink() or not path.is_file() or _linked_parent(folder, name):
        return False
    try:
        return sha256(path) == digest
    except (FormatError, OSError):
        return False


def _in_the_way(folder: Path, name: str) -> str | None:
    """Return what keeps a file from being moved to its place, None if nothing does."""
    if link := _linked_parent(folder, name):
        return f"{link} is a link or a file, expected a folder"
    path = folder / name
    if path.is_dir() and not path.is_symlink():
        return f"{shown(name)} is a folder, expected a file"
    return None


def _linked_parent(folder: Path, name: str) -> str | None:
    """Return the first folder on the way to a file that is a link or a file, None without one."""
    for parent in reversed(Path(name).parents[:-1]):
        path = folder / parent
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            return shown(parent.as_posix())
    return None
