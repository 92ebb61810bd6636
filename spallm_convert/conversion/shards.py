"""Shards written: dense tensors copied, linear weights sketched, block by block of rows.

Memory does not depend on the size of the model: at any time there is one block of one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from spallm_convert.calibration.store import CalibratedModules
from spallm_convert.errors import SourceError, SpallmError
from spallm_convert.progress import Progress
from spallm_convert.sketch.plan import Plan
from spallm_convert.sketch.rows import sketch_rows
from spallm_formats import (
    INDEX_MAP_SUFFIX,
    ITEM_BYTES,
    TABLE_SUFFIX,
    Shard,
    ShardFile,
    Staging,
    StoredTensor,
    read_bytes,
    to_float32,
)

#: Weights sketched, and bytes copied, at a time: large enough to keep all cores busy.
BLOCK_WEIGHTS = 1 << 23
_BLOCK_BYTES = 1 << 26


def write_shard(
    staging: Staging,
    shard: Shard,
    plan: Plan,
    sketches: CalibratedModules | None,
    progress: Progress,
) -> dict[str, Any]:
    """Writes a shard and gives its record, with squared errors and norms of its modules.

    sketches: modules that have been sketched already; None: they are sketched here. Raises
    SourceError for weights that are not finite, or a source that changed meanwhile.
    """
    record: dict[str, Any] = {"modules": {}}
    with staging.write_shard(shard, record) as file:
        for name in shard.tensors:
            if name in plan.kept:
                _copy(plan.kept[name], file)
            elif name.endswith(TABLE_SUFFIX):
                module = name.removesuffix(TABLE_SUFFIX)
                record["modules"][module] = (
                    _store(module, sketches, file)
                    if sketches
                    else _sketch(module, plan, file, progress)
                )
    return record


def _copy(tensor: StoredTensor, file: ShardFile) -> None:
    for start in range(0, tensor.nbytes, _BLOCK_BYTES):
        file.write(
            tensor.name, start, _read(tensor, start, min(start + _BLOCK_BYTES, tensor.nbytes))
        )


def _store(name: str, sketches: CalibratedModules, file: ShardFile) -> Sequence[float]:
    """Writes a module that has been sketched before; returns its sums."""
    module = sketches.read(name)
    if module.index_map.size:
        file.write(name + INDEX_MAP_SUFFIX, 0, module.index_map)
    file.write(name + TABLE_SUFFIX, 0, module.table)
    return module.sums


def _sketch(name: str, plan: Plan, file: ShardFile, progress: Progress) -> tuple[float, float]:
    """Sketches one module; returns its squared error and squared norm."""
    module, tensor = plan.layers[name].module, plan.layers[name].weight
    row_bytes = module.in_features * ITEM_BYTES[tensor.dtype]
    step = max(1, BLOCK_WEIGHTS // module.in_features)
    sums = []
    for first in range(0, module.out_features, step):
        rows = min(step, module.out_features - first)
        raw = _read(tensor, first * row_bytes, (first + rows) * row_bytes)
        weights = to_float32(raw, tensor.dtype).reshape(rows, module.in_features)
        _check_finite(weights, tensor, first)
        try:
            sketched = sketch_rows(weights, module, plan.metadata, first)
        except OverflowError as error:
            raise SourceError(
                f"{tensor.file.name}: tensor {tensor.name!r} has {error}; use --table-dtype float32"
            ) from error
        index_map, table = sketched.index_map, sketched.table
        if index_map.size:
            file.write(name + INDEX_MAP_SUFFIX, first * index_map.shape[1], index_map)
        file.write(name + TABLE_SUFFIX, first * table[0].nbytes, table)
        sums.append(sketched.sums)
        progress.advance(weights.size, name)
    errors, norms = np.concatenate(sums).T
    return math.fsum(errors), math.fsum(norms)  # exactly rounded, so blocks do not matter


def _read(tensor: StoredTensor, start: int, stop: int) -> bytearray:
    try:
        return read_bytes(tensor, start, stop)
    except SpallmError as error:
        raise SourceError(f"{error} (the source changed while it was read)") from error


def _check_finite(
    weights: np.ndarray[Any, np.dtype[np.float32]], tensor: StoredTensor, first: int
) -> None:
    finite = np.isfinite(weights)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise SourceError(
            f"{tensor.file.name}: tensor {tensor.name!r} holds {weights[row, column]} at row "
            f"{first + row}, column {column}; only finite weights can be sketched "
            f"(--ignore {tensor.name.removesuffix('.weight')} leaves the layer dense)"
        )
