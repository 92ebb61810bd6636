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
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any, Self

from filelock import BaseFileLock, FileLock, Timeout

from .durable import flush_folder, write_atomic
from .errors import FormatError, SpallmError
from .files import load_json, sha256, to_json
from .layout import INDEX_FILE, SHARD_NAME, Shard
from .shard_file import ShardFile

PARTIAL_FOLDER = ".spallm-partial"
CONFIG_FILE = "config.json"
_PLAN_FILE = "plan.json"
_MARKER = "complete.json"
_LOCK = "lock"
_FILES = "files"
_SCRATCH = "scratch"
#: Errors of file systems without locks, such as some network file systems. Two runs into one folder
#: are not kept apart there.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}


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
        self._files = self._partial / _FILES
        self._marker = self._partial / _MARKER
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
        self._lock = _locked(self._partial / _LOCK, self.folder)
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
            record = load_json(self._record_path(shard).read_bytes(), shard.filename)
        except (OSError, FormatError):
            return None
        sound = (
            isinstance(record, dict)
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
        """
        return self.write_file(name, source.read_bytes())

    def scratch(self, name: str, *, worth_keeping: bool = False) -> Path:
        """Create a folder for intermediate files, removed when the checkpoint is published.

        Args:
            name: Name of the folder.
            worth_keeping: Whether its files are kept after a failure, so that a later run can use
                them.

        Returns:
            The folder.
        """
        path = self._partial / _SCRATCH / name
        path.mkdir(parents=True, exist_ok=True)
        if worth_keeping:
            self._worth_keeping.append(path)
        return path

    @property
    def is_published(self) -> bool:
        """Return whether an earlier run wrote all files and only had to move them up."""
        return self._marker.exists()

    def publish(self, names: list[str], obsolete: list[str]) -> None:
        """Move files up into the folder.

        Args:
            names: Files to move, including config.json.
            obsolete: Files of an older checkpoint in the folder, removed unless they are replaced.
        """
        assert CONFIG_FILE in names
        gone = sorted({*obsolete, *self._older_shards()} - set(names))
        flush_folder(self._files)  # before the marker, which says that all files are written
        write_atomic(self._marker, to_json({"names": names, "obsolete": gone}))
        self.finish_publishing()

    def finish_publishing(self) -> None:
        """Move up the files that are still to be moved; a second call does nothing more.

        Raises:
            SpallmError: If a file of an interrupted run is missing, or its name leads out of the
                folder.
        """
        todo = load_json(self._marker.read_bytes(), _MARKER)
        names = [_inside(name) for name in todo["names"] if name != CONFIG_FILE]
        staged = [name for name in [*names, CONFIG_FILE] if (self._files / name).exists()]
        lost = [n for n in names if n not in staged and not (self.folder / n).exists()]
        if lost:
            raise SpallmError(
                f"{self.folder}: {', '.join(lost[:3])} of the interrupted conversion "
                f"cannot be found; use --overwrite to start again"
            )
        if staged:
            (self.folder / CONFIG_FILE).unlink(missing_ok=True)
            for name in todo["obsolete"]:
                (self.folder / _inside(name)).unlink(missing_ok=True)
        for name in staged:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self._files / name).replace(self.folder / name)
            flush_folder((self.folder / name).parent)
        self._remove_work()

    def _older_shards(self) -> list[str]:
        names = [path.name for path in self.folder.iterdir()]
        return [name for name in names if SHARD_NAME.fullmatch(name) or name == INDEX_FILE]

    def _open_plan(self) -> None:
        path = self._partial / _PLAN_FILE
        if self._overwrite or not is_unfinished(self.folder):
            # Remove the marker first: without it, the rest can only be an unfinished conversion.
            self._marker.unlink(missing_ok=True)
            flush_folder(self._partial)
            _clear(self._partial, keep={_LOCK})
        if path.exists():
            differences = _differences(load_json(path.read_bytes(), _PLAN_FILE), self._plan)
            if differences:
                raise SpallmError(
                    f"{self.folder} holds an unfinished conversion of something else "
                    f"({'; '.join(differences)}); use --overwrite to start again"
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
            self._remove_work()
        self._lock.release()
        if os.name == "nt":
            # An open file cannot be removed there: the lock was left in the work folder until now.
            with contextlib.suppress(OSError):
                self._partial.rmdir()
        if give_up and self._made_folder:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _remove_work(self) -> None:
        """Remove the work folder in an order that a later run understands if this one is killed.

        The marker is removed before the plan that it belongs to, and the lock last.
        """
        with contextlib.suppress(OSError):
            _clear(self._partial, keep={_MARKER, _PLAN_FILE, _LOCK})
            for name in (_MARKER, _PLAN_FILE, _LOCK):
                (self._partial / name).unlink(missing_ok=True)
            self._partial.rmdir()

    def _record_path(self, shard: Shard) -> Path:
        return self._partial / (shard.filename + ".record.json")


def check_output_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Check that a checkpoint may be written into a folder.

    Args:
        folder: Output folder.
        resume: Whether an unfinished conversion in it is continued.
        overwrite: Whether its contents are replaced.

    Raises:
        SpallmError: If it is a file, or holds something that neither option covers.
    """
    if folder.exists() and not folder.is_dir():
        raise SpallmError(f"output {folder} is a file, expected a folder or a new name")
    if not folder.exists() or overwrite:
        return
    if is_unfinished(folder):
        if not resume:
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
    return any((folder / PARTIAL_FOLDER / name).exists() for name in (_FILES, _MARKER))


def remove_leftovers(folder: Path) -> None:
    """Remove what a run killed in its very last step left beside a complete checkpoint."""
    if not is_unfinished(folder):
        shutil.rmtree(folder / PARTIAL_FOLDER, ignore_errors=True)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_inside(name: str) -> bool:
    """Return whether a name read from a file is a path below a folder, on any system."""
    return bool(name) and not any(
        path.anchor or ".." in path.parts for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def _inside(name: str) -> str:
    """Return a name from a work file; raise SpallmError if it leads out of the folder."""
    if not is_inside(name):
        raise SpallmError(
            f"{_MARKER}: {name!r} is not a path inside the output folder; "
            f"use --overwrite to start again"
        )
    return name


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    for key in {**before, **now}:
        was, is_now = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(is_now, dict):
            found += _differences(was, is_now)
        elif was != is_now:
            digests = _is_digest(was) or _is_digest(is_now)  # they mean nothing to a reader
            found.append(f"other {key}" if digests else f"{key} was {was!r}, now {is_now!r}")
    return found


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _locked(path: Path, folder: Path) -> BaseFileLock:
    """Lock a file. The system gives up the lock when the process ends, however it ends."""
    # A soft lock, which is only a file, would outlive a process that is killed.
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
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


def _clear(folder: Path, *, keep: set[str]) -> None:
    """Empty a folder, except for the files `keep`."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()
