"""Write a checkpoint so that its folder can be loaded only when it is complete.

All files are first written below `<folder>/.spallm-partial/`: under a temporary name, flushed to
disk, then renamed into `files/`. When all files are written, a marker is written too and the files
move up into `<folder>`. `config.json` moves last: no loader accepts the folder as a model without
it.

The process may be killed at any moment. The next run finds finished shards by their names and
continues from there. If the files were already moving up, it moves the rest. Until they move,
nothing in `<folder>` is touched, so with `overwrite` the older checkpoint exists until the newer
one is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import BaseFileLock

from .durable import flush_folder, write_atomic
from .errors import FormatError, SpallmError
from .files import read_json, read_small, sha256, to_json
from .layout import Shard
from .publishing import finish_publishing, publish
from .shard_file import ShardFile
from .text import shown, summary
from .work_folder import (
    FILES,
    LOCK,
    MARKER,
    PARTIAL_FOLDER,
    PLAN_FILE,
    SCRATCH,
    check_output_folder,
    clear,
    is_unfinished,
    locked,
    read_work_file,
    remove_work_folder,
)

#: The most bytes of a file that is copied from the source. Tokenizers have up to 40 MB.
MAX_COPIED_BYTES = 1 << 28


class Staging:
    """Write a checkpoint into a folder, in a `with` block.

    Entering the block raises SpallmError if the folder holds something and neither `resume` nor
    `overwrite` says what to do with it, if the plans differ, or if another process is writing
    there.

    Args:
        folder: Output folder.
        plan: Source, options and versions. A run is resumed only under an equal plan.
        resume: Whether to continue an unfinished conversion in the folder.
        overwrite: Whether to replace what the folder holds.
    """

    def __init__(
        self, folder: Path, plan: dict[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.folder = folder
        self._partial = folder / PARTIAL_FOLDER
        self._files = self._partial / FILES
        self._marker = self._partial / MARKER
        self._plan = plan
        self._resume = resume
        self._overwrite = overwrite
        self._lock: BaseFileLock | None = None
        self._made_folder = False
        self._worth_keeping: list[Path] = []
        self._resumed = False

    def __enter__(self) -> Self:
        check_output_folder(self.folder, resume=self._resume, overwrite=self._overwrite)
        self._made_folder = not self.folder.exists()
        # If this run fails, the work of an earlier run stays: only the user may give it up.
        self._resumed = is_unfinished(self.folder) and not self._overwrite
        self._partial.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self.folder)
        try:
            self._open_plan()
        except BaseException:
            self._leave(failed=True)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave(failed=kind is not None)

    def has(self, shard: Shard) -> bool:
        """Return whether a shard has been written; `record` also checks that it is intact."""
        return (self._files / shard.filename).exists()

    def record(self, shard: Shard) -> dict[str, Any] | None:
        """Return the record of a shard that `write_shard` kept.

        Returns:
            The record; None if the shard is missing, damaged or differs from the plan.
        """
        if not self.has(shard):
            return None
        try:
            record = read_json(self._record_path(shard))
        except (OSError, FormatError):
            return None
        sound = (
            isinstance(record, dict)
            and record.get("digest") == _record_digest(record)
            and record.get("header") == _digest(shard.header)
            and record.get("sha256") == sha256(self._files / shard.filename)
        )
        return record if sound else None

    @contextlib.contextmanager
    def write_shard(self, shard: Shard, record: dict[str, Any]) -> Iterator[ShardFile]:
        """Yield a ShardFile to fill.

        When the block ends, the shard is complete and `record` is kept with it.

        Args:
            shard: The planned shard.
            record: Any JSON values, which may be added inside the block. "sha256" and "bytes" of
                the file are added at its end.
        """
        temporary = self._partial / (shard.filename + ".tmp")
        file = ShardFile(temporary, shard)
        try:
            yield file
            file.close()
        except BaseException:
            file.abandon()
            raise
        record |= {
            "sha256": sha256(temporary),
            "bytes": shard.nbytes,
            "header": _digest(shard.header),
        }
        record["digest"] = _record_digest(record)
        write_atomic(self._record_path(shard), to_json(record))
        temporary.replace(self._files / shard.filename)

    def write_file(self, name: str, data: bytes) -> dict[str, Any]:
        """Add a file to the checkpoint.

        Args:
            name: Path in the checkpoint.
            data: Contents.

        Returns:
            "sha256" and "bytes" of the file.
        """
        write_atomic(self._files / name, data)
        return {"sha256": _digest(data), "bytes": len(data)}

    def copy_file(self, source: Path, name: str) -> dict[str, Any]:
        """Add a copy of a small file to the checkpoint.

        Args:
            source: File to copy.
            name: Path in the checkpoint.

        Returns:
            "sha256" and "bytes" of the file.

        Raises:
            FormatError: If it is not a regular file, too large, or a git-lfs pointer.
        """
        return self.write_file(name, read_small(source, MAX_COPIED_BYTES))

    def scratch(self, name: str, *, worth_keeping: bool = False) -> Path:
        """Create a folder for intermediate files, removed when the checkpoint is published.

        Args:
            name: Name of the folder.
            worth_keeping: Whether its files are kept after a failure, so that a later run can use
                them.

        Returns:
            The folder.
        """
        path = self._partial / SCRATCH / name
        path.mkdir(parents=True, exist_ok=True)
        if worth_keeping:
            self._worth_keeping.append(path)
        return path

    @property
    def is_published(self) -> bool:
        """Return whether an earlier run wrote all files and only had to move them up."""
        return self._marker.exists()

    def publish(self, names: list[str], older: Mapping[str, str]) -> None:
        """Move files up into the folder, as `publishing.publish` does."""
        publish(self.folder, names, older)

    def finish_publishing(self) -> None:
        """Move up the files that an interrupted run did not."""
        finish_publishing(self.folder)

    def _open_plan(self) -> None:
        path = self._partial / PLAN_FILE
        if self._overwrite or not is_unfinished(self.folder):
            # Remove the marker first: without it, the rest can only be an unfinished conversion.
            self._marker.unlink(missing_ok=True)
            flush_folder(self._partial)
            clear(self._partial, keep={LOCK})
        if path.exists():
            differences = _differences(read_work_file(self.folder, PLAN_FILE), self._plan)
            if differences:
                raise SpallmError(
                    f"{self.folder} holds an unfinished conversion of something else "
                    f"({summary(differences)}); use --overwrite to start again"
                )
        else:
            write_atomic(path, to_json(self._plan))
        self._files.mkdir(exist_ok=True)
        for unfinished in self._partial.glob("*.tmp"):  # this run may need the space
            unfinished.unlink()

    def _leave(self, *, failed: bool) -> None:
        """Release the lock. After a failure with nothing worth resuming, remove the work folder."""
        assert self._lock is not None
        work = (self._files, *self._worth_keeping)
        nothing_done = not any(path.exists() and any(path.iterdir()) for path in work)
        give_up = failed and nothing_done and not self._resumed and not self.is_published
        if give_up:
            remove_work_folder(self.folder)
        self._lock.release()
        if os.name == "nt":
            # An open file cannot be removed there: the lock was left in the work folder until now.
            with contextlib.suppress(OSError):
                self._partial.rmdir()
        if give_up and self._made_folder:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _record_path(self, shard: Shard) -> Path:
        return self._partial / (shard.filename + ".record.json")


def _record_digest(record: dict[str, Any]) -> str:
    """Return the digest of a record without its own digest, whatever the order of its keys."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    return _digest(json.dumps(rest, sort_keys=True).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    for key in {**before, **now}:
        was, is_now = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(is_now, dict):
            found += _differences(was, is_now)
        elif was != is_now:
            digests = _is_digest(was) or _is_digest(is_now)  # they mean nothing to a reader
            found.append(
                f"other {key}" if digests else f"{key} was {shown(was)}, now {shown(is_now)}"
            )
    return found


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
