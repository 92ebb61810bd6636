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
from spallm_formats import SketchedModule, fingerprint, map_digest, tables_digest

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

    def affine_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all shifts and scales, by name of the tensor."""
        return {
            tensor: shape.affine_shape
            for name, shape in self.shapes.items()
            for tensor in shape.affine_names(name)
        }

    def cut(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tables as the checkpoint has them.

        Args:
            values: The tables by key of their pair.

        Returns:
            The tables of all stored modules, by name of the tensor.
        """
        return {
            shape.table_name(name): self._cut(name, values).reshape(shape.table_shape)
            for name, shape in self.shapes.items()
        }

    def cut_affine(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return shifts and scales as an affine checkpoint has them.

        Args:
            values: The shifts and scales by their names in the model.

        Returns:
            The shifts and scales of all stored modules, by name of the tensor.
        """
        found = {}
        for number in (0, 1):
            chosen = {pair.key: values[pair.affine_keys[number]] for pair in self.pairs}
            for name, shape in self.shapes.items():
                rows = self._cut(name, chosen)
                found[shape.affine_names(name)[number]] = rows.reshape(shape.affine_shape)
        return found

    def _cut(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """Return the rows of a stored module, given values by key of their pair."""
        rows = [part.of(values[part.pair.key]) for part in self._parts[name]]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def join(self, stored: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return tables as the model has them.

        Args:
            stored: Gives the tables of a stored module by name of the tensor.

        Returns:
            The tables by key of their pair.
        """
        return {
            pair.key: _join(pair, lambda name, module: stored(module.table_name(name))).reshape(
                pair.sketch.shape.table_shape
            )
            for pair in self.pairs
        }

    def join_affine(self, stored: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return shifts and scales as the model has them.

        Args:
            stored: Gives the shifts or scales of a stored module by name of the tensor.

        Returns:
            The shifts and scales by their names in the model.
        """
        found = {}
        for number in (0, 1):

            def numbers(name: str, module: SketchedModule, number: int = number) -> Tensor:
                return stored(module.affine_names(name)[number])

            for pair in self.pairs:
                shape = pair.sketch.shape.affine_shape
                found[pair.affine_keys[number]] = _join(pair, numbers).reshape(shape)
        return found

    def tables_digest(self, tables: Callable[[str], Tensor]) -> str:
        """Return the digest of tables, as formats/SPEC.md defines it.

        Args:
            tables: Gives the tables of a pair by its key.
        """
        values = {pair.key: whole(tables(pair.key)).bfloat16().cpu() for pair in self.pairs}
        return tables_digest(
            (name, np.from_dlpack(self._cut(name, values).contiguous().view(torch.uint8)))
            for name in sorted(self.shapes)
        )

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


def _join(pair: Pair, stored: Callable[[str, SketchedModule], Tensor]) -> Tensor:
    """Return the rows of a pair, given the values of a stored module by its name."""
    rows = []
    for name, module, first, count in pair.sketch.spans:
        values = stored(name, module)
        dimensions = 1 if module.experts is None else 2  # that number the rows
        flat = values.reshape(module.rows, *values.shape[dimensions:])
        rows.append(flat[first : first + count])
    return rows[0] if len(rows) == 1 else torch.cat(rows)
