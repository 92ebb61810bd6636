"""Cut the tables of a model into those of its stored modules, and join them again.

Tables-only checkpoints and fingerprints know stored modules only, because those are the same in
every version of transformers, and for every reader of the format.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spallm_convert.errors import OptionError
from spallm_formats import SketchedModule, fingerprint, map_digest

from .parameters import Pair, sketched_pairs
from .sharding import whole
from .sketch import Span

#: Digests of stored modules by name, each with the state of the index maps that it was taken of.
#: The keys are modules that have the first rows.
_digests: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Any, str]]] = (
    weakref.WeakKeyDictionary()
)


class _Part(NamedTuple):
    """Say where rows of a stored module are: `span` begins at row `start` of a pair."""

    pair: Pair
    start: int
    span: Span

    def of(self, values: Tensor) -> Tensor:
        """Return these rows of an index map or of tables."""
        dimensions = 2 if self.pair.sketch.shape.experts is None else 3
        rows = values.reshape(self.pair.sketch.shape.rows, *values.shape[dimensions - 1 :])
        return rows[self.start : self.start + self.span.rows]


@dataclass(frozen=True)
class StoredModules:
    """Hold the stored modules that a model consists of.

    Attributes:
        shapes: The modules by name.
        pairs: The sketches of the model.
    """

    shapes: dict[str, SketchedModule]
    pairs: list[Pair]
    _parts: dict[str, list[_Part]]

    @classmethod
    def of(cls, model: nn.Module) -> StoredModules:
        """Return the stored modules of a model from `sketched_model`."""
        pairs = sketched_pairs(model)
        shapes: dict[str, SketchedModule] = {}
        parts: dict[str, list[_Part]] = {}
        for pair in pairs:
            start = 0
            for span in pair.sketch.spans:
                shapes[span.name] = span.module
                parts.setdefault(span.name, []).append(_Part(pair, start, span))
                start += span.rows
        for found in parts.values():
            found.sort(key=lambda part: part.span.first)
        return cls(shapes, pairs, parts)

    def table_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tables in the checkpoint, by name of the tensor."""
        return {shape.table_name(name): shape.table_shape for name, shape in self.shapes.items()}

    def cut(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tables as the checkpoint has them.

        Args:
            values: The tables by key of their pair.

        Returns:
            The tables of all stored modules, by name of the tensor.
        """
        found = {}
        for name, parts in self._parts.items():
            shape = self.shapes[name]
            rows = [part.of(values[part.pair.key]) for part in parts]
            joined = rows[0] if len(rows) == 1 else torch.cat(rows)
            found[shape.table_name(name)] = joined.reshape(shape.table_shape)
        return found

    def join(self, stored: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return tables as the model has them.

        Args:
            stored: Gives the tables of a stored module by name of the tensor.

        Returns:
            The tables by key of their pair.
        """
        found = {}
        for pair in self.pairs:
            rows = []
            for name, module, first, count in pair.sketch.spans:
                values = stored(module.table_name(name))
                flat = values.reshape(module.rows, module.groups_per_row, module.entries)
                rows.append(flat[first : first + count])
            joined = rows[0] if len(rows) == 1 else torch.cat(rows)
            found[pair.key] = joined.reshape(pair.sketch.shape.table_shape)
        return found

    def fingerprint(self) -> str:
        """Return the fingerprint of the model's index maps, as formats/SPEC.md defines it.

        The first call reads every index map, at about the speed of SHA-256. Later calls use a
        cache.
        """
        gathered: dict[str, Tensor] = {}
        digests = {name: self._digest(name, gathered) for name in self._parts}
        return fingerprint(self.shapes, digests)

    def _digest(self, name: str, gathered: dict[str, Tensor]) -> str:
        """Return the digest of a stored module. `gathered` holds the index map read last."""
        parts = self._parts[name]
        if any(part.pair.table.parameter.is_meta for part in parts):
            raise OptionError(
                f"{name} is offloaded (device_map), but tables are saved and loaded only if the "
                f"whole model is in memory: load it without device_map"
            )
        seed = parts[0].pair.sketch.hash_seed
        if seed is not None:
            return map_digest(None, seed)
        maps = [part.pair.index_map.parameter for part in parts]
        state = [(index_map.data_ptr(), index_map._version) for index_map in maps]
        cache = _digests.setdefault(parts[0].pair.index_map.module, {})
        if name not in cache or cache[name][0] != state:
            rows = []
            for part, index_map in zip(parts, maps, strict=True):
                if part.pair.key not in gathered:
                    gathered.clear()
                    gathered[part.pair.key] = whole(index_map).cpu()
                rows.append(part.of(gathered[part.pair.key]))
            packed = rows[0].contiguous() if len(rows) == 1 else torch.cat(rows)
            # Not `Tensor.numpy`: after that call FSDP2 could not free the gathered memory.
            cache[name] = (state, map_digest(np.from_dlpack(packed), None))
        return cache[name][1]
