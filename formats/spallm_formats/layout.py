"""Decide which tensor goes into which shard, from the tensors and the size limit alone.

Nothing here depends on what has been computed so far. Therefore an interrupted conversion can be
resumed and gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .files import to_json
from .header import TensorSpec, build_header

SINGLE_SHARD = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: Matches the names that `_filename` makes; and a shell pattern for the names of several shards.
SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
SHARDS_GLOB = "model-*-of-*.safetensors"


@dataclass(frozen=True)
class Shard:
    """Hold the plan of one file of the checkpoint.

    Attributes:
        filename: Name of the file.
        header: Its header, with the length in front.
        tensors: Its tensors by name.
        offsets: Offset of each tensor from the start of the file, in bytes.
    """

    filename: str
    header: bytes
    tensors: dict[str, TensorSpec]
    offsets: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Return the size of the file in bytes."""
        return len(self.header) + sum(spec.nbytes for spec in self.tensors.values())


def plan_shards(groups: Iterable[Sequence[TensorSpec]], max_shard_bytes: int) -> list[Shard]:
    """Fill shards in order, keeping the tensors of a group in one shard.

    One shard is named `model.safetensors`; several are numbered and need an index.

    Args:
        groups: Groups of tensors.
        max_shard_bytes: The most bytes of tensor data in a shard. A single larger group gets its
            own shard.

    Returns:
        The shards.
    """
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for group in groups:
        size = sum(spec.nbytes for spec in group)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1] += group
        filled += size
    count = len(shards)
    return [_shard(_filename(number, count), specs) for number, specs in enumerate(shards, 1)]


def index_json(shards: Sequence[Shard]) -> bytes:
    """Return the contents of `model.safetensors.index.json` for several shards.

    Args:
        shards: All shards of the checkpoint.
    """
    total = sum(spec.nbytes for shard in shards for spec in shard.tensors.values())
    weight_map = {name: shard.filename for shard in shards for name in shard.tensors}
    document = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return to_json(document)


def _filename(number: int, count: int) -> str:
    return SINGLE_SHARD if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _shard(filename: str, specs: Sequence[TensorSpec]) -> Shard:
    header, offsets = build_header(specs)
    return Shard(filename, header, {spec.name: spec for spec in specs}, offsets)
