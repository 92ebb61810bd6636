"""Which tensor goes into which shard: a pure function of the tensors and the size limit.

An interrupted conversion can be resumed, and ends in the same bytes, only because nothing here
depends on what has been computed so far.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .header import TensorSpec, build_header, to_json

SINGLE_SHARD = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: Names that `_filename` makes, and those of several files as a shell matches them.
SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
SHARDS_GLOB = "model-*-of-*.safetensors"


@dataclass(frozen=True)
class Shard:
    """A file of the checkpoint: its name, header, and where each tensor's bytes begin."""

    filename: str
    header: bytes
    tensors: dict[str, TensorSpec]
    offsets: dict[str, int]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(spec.nbytes for spec in self.tensors.values())


def plan_shards(groups: Iterable[Sequence[TensorSpec]], max_shard_bytes: int) -> list[Shard]:
    """Fills shards in order, keeping the tensors of a group in one shard.

    A shard holds at most `max_shard_bytes` of tensor data, unless a single group is larger. One
    shard is `model.safetensors`; several are numbered and need an index.
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
    """The `model.safetensors.index.json` of several shards."""
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
