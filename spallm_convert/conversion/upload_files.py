"""Prepare the files of a checkpoint for an upload: exactly these files, as they were checked."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd

from spallm_convert.errors import FormatError
from spallm_convert.source.extra_files import leads_inside
from spallm_formats.text import shown

#: Larger files stay on the disk until they are sent in parts: the Hub keeps them out of git. A
#: smaller file could be sent with the commit, so it is read once, and what is hashed is sent.
_SMALL = 10_000_000


@dataclass(frozen=True)
class _State:
    """Hold what changes when a file is written or replaced."""

    inode: int
    size: int
    modified: int


class UploadFiles:
    """Watch files from before they are checked until they are on the Hub.

    Args:
        folder: Folder of the checkpoint.
        names: Paths of the files, relative to the folder.

    Raises:
        FormatError: If a name leads out of the folder through a link, or is not a regular file.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._folder = folder
        self._states = {name: _state(folder, name) for name in sorted(set(names))}

    def additions(self, hashes: Mapping[str, str]) -> list[CommitOperationAdd]:
        """Return the operations that add the files to a repository. Every file is hashed.

        Args:
            hashes: SHA-256 that was checked, by name, of files for which it is known.

        Raises:
            FormatError: If a file has changed, or cannot have its name on the Hub.
        """
        self.check_unchanged()
        additions = [self._addition(name, state) for name, state in self._states.items() if state]
        self.check_unchanged()
        for addition in additions:
            name, found = addition.path_in_repo, addition.upload_info.sha256.hex()
            if hashes.get(name, found) != found:
                raise _changed(self._folder, name)
        return additions

    def check_unchanged(self) -> None:
        """Raise FormatError if a file is not the one that was checked."""
        for name, state in self._states.items():
            if state is None or _state(self._folder, name) != state:
                raise _changed(self._folder, name)

    def _addition(self, name: str, state: _State) -> CommitOperationAdd:
        path = self._folder / name
        content = path.read_bytes() if state.size <= _SMALL else str(path)
        try:
            return CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        except ValueError as error:
            raise FormatError(
                f"{self._folder}: {shown(name)} cannot be the name of a file on the Hub ({error})"
            ) from error


def _state(folder: Path, name: str) -> _State | None:
    """Return the state of a file; None if it does not exist."""
    path = folder / name
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if not leads_inside(folder, path):
        raise FormatError(
            f"{folder}: {shown(name)} is a link to a file outside of the folder, so it is not "
            f"uploaded; put a copy of the file in its place"
        )
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(f"{folder}: {shown(name)} is not a regular file; remove it")
    return _State(found.st_ino, found.st_size, found.st_mtime_ns)


def _changed(folder: Path, name: str) -> FormatError:
    return FormatError(
        f"{folder}: {shown(name)} changed after it was checked, so nothing was committed; push "
        f"again when nothing writes into the folder"
    )
