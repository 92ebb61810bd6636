"""Notice a source that changes while it is converted, because its hashes are recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from spallm_convert.errors import SourceError
from spallm_convert.source.locate import Source
from spallm_formats import SpallmError, sha256

#: Files of a model lie in its folder, or in one folder in there.
_DEPTHS = ("*", "*/*")
_State = tuple[int, ...]


class SourceWatch:
    """Remember the state of a source's files, to compare it after they have been read.

    Create it before anything of the source is read. The system's times of a file are compared
    first, and its hash only if they differ, so `check` is cheap.

    Args:
        source: The source.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        folder = source.path
        found = [folder] if source.is_gguf else [p for d in _DEPTHS for p in folder.glob(d)]
        self._states = {path: _state(path) for path in found}
        self._hashes: dict[Path, str] = {}

    def expect(self, hashes: Mapping[str, str]) -> None:
        """Set the SHA-256 of each file that is read, by its name in the source."""
        folder = self._source.path
        self._hashes = {
            folder if self._source.is_gguf else folder / name: digest
            for name, digest in hashes.items()
        }

    def check(self) -> None:
        """Check that the files are those that were hashed.

        Raises:
            SourceError: If one of them has changed.
        """
        for path, digest in self._hashes.items():
            now = _state(path)
            if now == self._states.get(path):
                continue
            if now is None or not _has_hash(path, digest):
                raise SourceError(
                    f"{path}: changed during the conversion; convert again when nothing writes to "
                    f"it"
                )
            self._states[path] = now


def _state(path: Path) -> _State | None:
    """Return what changes if anybody writes to a file or replaces it; None if it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _has_hash(path: Path, digest: str) -> bool:
    try:
        return sha256(path) == digest
    except (OSError, SpallmError):
        return False
