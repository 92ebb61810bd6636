"""Write a safetensors file whose tensors arrive in pieces, in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from .durable import flush
from .layout import Shard


class ShardFile:
    """Write one shard: the header first, then each tensor at its planned offset.

    Args:
        path: File to write.
        shard: The planned shard.
    """

    def __init__(self, path: Path, shard: Shard) -> None:
        self._shard = shard
        self._missing = {name: spec.nbytes for name, spec in shard.tensors.items()}
        self._file: BinaryIO = path.open("wb")
        self._file.write(shard.header)
        self._file.truncate(shard.nbytes)

    def write(self, name: str, at: int, data: Any) -> None:
        """Write a piece of a tensor.

        Args:
            name: Name of the tensor.
            at: Offset in the tensor, in bytes.
            data: A C-contiguous buffer.
        """
        view = memoryview(data).cast("B")
        self._file.seek(self._shard.offsets[name] + at)
        self._file.write(view)
        self._missing[name] -= len(view)

    def close(self) -> None:
        """Flush to disk and close. A tensor that is not complete is a bug in the caller."""
        incomplete = {name: left for name, left in self._missing.items() if left}
        assert not incomplete, f"bytes missing in {self._shard.filename}: {incomplete}"
        flush(self._file)
        self._file.close()

    def abandon(self) -> None:
        """Close a file that will not be completed."""
        self._file.close()
