"""Make trainable layers from stored sketches, and take their tables apart again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from spallm_convert.calibration.blocks.targets import Segment, Target
from spallm_convert.calibration.store import CalibratedModules
from spallm_convert.runtime.linear import SketchedLinear
from spallm_convert.sketch.layer import Layer
from spallm_formats import SketchedModule, SketchMetadata, pack

Array = np.ndarray[Any, Any]


def trainable_layer(
    target: Target, dense: nn.Module, metadata: SketchMetadata, done: CalibratedModules
) -> SketchedLinear:
    """Return a calibrated layer with a float32 table, to take the place of a dense one.

    Args:
        target: The parameter. Rows of all experts lie below each other in the result.
        dense: The linear layer, or the module of experts.
        metadata: Mapping, seed and table dtype.
        done: The calibrated modules.
    """
    module, weight = target.module, target.weight
    is_whole = len(target.pieces) == 1 and target.pieces[0][0].is_whole
    hashed = metadata.mapping == "hash"
    table = np.empty((weight.rows, module.groups_per_row, module.entries), np.float32)
    index_map: Array | None = None
    for layer in target.layers:
        kept = done.read(layer.name)
        own = kept.wide_table(layer.module, metadata)
        # Hashed rows are counted from the start of each stored weight, so their codes are kept.
        if hashed and not is_whole:
            packed = pack(kept.codes(layer.module, metadata), module.bits)
        else:
            packed = kept.index_map.reshape(layer.module.rows, -1 if kept.index_map.size else 0)
        if index_map is None:
            index_map = np.empty((weight.rows, packed.shape[1]), np.uint8)
        for segment in target.segments():
            if segment.layer.name == layer.name:
                here, there = places(segment, target)
                table[here], index_map[here] = own[there], packed[there]
    assert index_map is not None
    shape = SketchedModule(
        in_features=weight.in_features,
        out_features=weight.rows,
        bits=module.bits,
        groups_per_row=module.groups_per_row,
    )
    made = SketchedLinear(
        shape,
        bias=None if target.is_experts else getattr(dense, "bias", None),
        table_dtype=torch.float32,
        hash_seed=metadata.hash_seed if hashed and is_whole else None,
    )
    made.weight.data = torch.from_numpy(index_map)
    made.weight_table.data = torch.from_numpy(table)
    return made


def tables_of_layers(tables: Iterable[tuple[Target, Array]]) -> Iterator[tuple[Layer, Array]]:
    """Yield the stored weights with their tables, float32 [rows, groups, 2^bits].

    Args:
        tables: Parameters with their tables, such as those of `trainable_layer`.
    """
    begun: dict[str, Array] = {}
    missing: dict[str, int] = {}
    for target, table in tables:
        for segment in target.segments():
            layer, name = segment.layer, segment.layer.name
            if name not in begun:
                begun[name] = np.empty((layer.module.rows, *table.shape[1:]), np.float32)
                missing[name] = layer.module.rows
            here, there = places(segment, target)
            begun[name][there] = table[here]
            missing[name] -= segment.rows
            if not missing[name]:
                yield layer, begun.pop(name)


def places(segment: Segment, target: Target) -> tuple[slice, slice]:
    """Return the rows of a segment in the parameter, and in the stored weight."""
    first = segment.expert * target.weight.out_features + segment.first
    return (
        slice(first, first + segment.rows),
        slice(segment.stored, segment.stored + segment.rows),
    )
