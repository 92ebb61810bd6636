"""Write shards: copy dense tensors, and sketch linear weights in blocks of rows.

Memory does not depend on the size of the model, because one block of one tensor is held at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import numpy as np

from spallm_convert.calibration.importance import Importance
from spallm_convert.calibration.store import CalibratedModules, are_sums
from spallm_convert.errors import SourceError
from spallm_convert.progress import Progress
from spallm_convert.sketch.layer import Layer
from spallm_convert.sketch.plan import Plan
from spallm_convert.sketch.row_blocks import RowBlock, read_source, row_blocks
from spallm_convert.sketch.rows import reduction_note, sketch_rows
from spallm_convert.source.reading import read_stored
from spallm_formats import Shard, ShardFile, Staging, StoredTensor

#: Weights that are sketched at a time, enough for all cores, and bytes that are copied at a time.
BLOCK_WEIGHTS = 1 << 23
_BLOCK_BYTES = 1 << 26


def write_shard(
    staging: Staging,
    shard: Shard,
    plan: Plan,
    sketches: CalibratedModules | None,
    importance: Mapping[str, Importance],
    progress: Progress,
    check: Callable[[], None],
) -> dict[str, Any]:
    """Write a shard.

    Args:
        staging: Output folder.
        shard: The planned shard.
        plan: Plan of the conversion.
        sketches: Calibrated modules. All others are sketched here.
        importance: How much the columns of modules count that are sketched here, by name. Modules
            that it lacks are sketched from their weights alone.
        progress: Told about every block that is sketched here.
        check: Called when the shard's tensors have been read. If it raises an error because the
            source has changed, the shard is not kept.

    Returns:
        Record of the shard, with the squared error and squared norm of each of its modules under
        `modules`, and those of its outputs if they are known.

    Raises:
        SourceError: If weights are not finite or do not fit the tables' dtype, or the source
            changed during the conversion.
    """
    record: dict[str, Any] = {"modules": {}}
    layers = {layer.module.table_name(name): layer for name, layer in plan.layers.items()}
    with staging.write_shard(shard, record) as file:
        for name in shard.tensors:
            if name in plan.kept:
                _copy(plan.kept[name], file)
            elif layer := layers.get(name):
                record["modules"][layer.name] = (
                    _store(layer, sketches, file)
                    if sketches and layer.name in sketches
                    else _sketch(layer, plan, importance.get(layer.name), file, progress)
                )
        check()
    return record


def kept_record(
    staging: Staging, shard: Shard, plan: Plan, with_outputs: Container[str]
) -> dict[str, Any] | None:
    """Return the record of a shard that an earlier run wrote, None if it must be written again.

    Args:
        staging: Output folder.
        shard: The planned shard.
        plan: Plan of the conversion.
        with_outputs: Names of the modules that must have sums of outputs too.
    """
    record = staging.record(shard)
    if record is None or record.get("bytes") != shard.nbytes:
        return None
    names = {
        name
        for name, layer in plan.layers.items()
        if layer.module.table_name(name) in shard.tensors
    }
    sums = record.get("modules")
    if not isinstance(sums, dict) or sums.keys() != names:
        return None
    calibrated = {name for name in names if name in with_outputs}
    for some, count in ((calibrated, 4), (names - calibrated, 2)):
        if not are_sums({name: sums[name] for name in some}, count):
            return None
    return record


def _copy(tensor: StoredTensor, file: ShardFile) -> None:
    for start in range(0, tensor.nbytes, _BLOCK_BYTES):
        stop = min(start + _BLOCK_BYTES, tensor.nbytes)
        file.write(tensor.name, start, read_source(read_stored, tensor, start, stop))


def _store(layer: Layer, sketches: CalibratedModules, file: ShardFile) -> Sequence[float]:
    """Write a calibrated module; return its sums."""
    found = sketches.read(layer.name)
    if found.index_map.size:
        file.write(layer.module.index_map_name(layer.name), 0, found.index_map)
    file.write(layer.module.table_name(layer.name), 0, found.table)
    return found.sums


def _sketch(
    layer: Layer,
    plan: Plan,
    importance: Importance | None,
    file: ShardFile,
    progress: Progress,
) -> Sequence[float]:
    """Sketch and write one module; return its squared error and squared norm.

    With importance, return those of its outputs too, as if its inputs were uncorrelated.
    """
    module, tensor, name = layer.module, layer.weight, layer.name
    sums, reduced = [], 0
    for block in row_blocks(layer, BLOCK_WEIGHTS, each_expert=plan.metadata.mapping == "hash"):
        _check_finite(block, layer)
        try:
            sketched = sketch_rows(
                block.weights,
                module,
                plan.metadata,
                block.first_of_expert,
                plan.limit,
                None if importance is None else _of_rows(importance, block, module.out_features),
            )
        except OverflowError as error:
            raise SourceError(
                f"{tensor.file.name}: tensor {tensor.name!r} has {error}; use --table-dtype float32"
            ) from error
        index_map, table = sketched.index_map, sketched.table
        if index_map.size:
            start = block.first * index_map.shape[1]
            file.write(module.index_map_name(name), start, index_map)
        file.write(module.table_name(name), block.first * table[0].nbytes, table)
        sums.append(sketched.sums)
        reduced += sketched.reduced
        progress.advance(block.weights.size, name)
    if plan.limit is not None and reduced:
        progress.remark(reduction_note(name, reduced, plan.limit))
    # The sums are exact, so the size of blocks does not matter.
    return [math.fsum(column) for column in np.concatenate(sums).T]


def _of_rows(importance: Importance, block: RowBlock, height: int) -> Importance:
    """Return the importance for a block of rows; `height` is the number of rows of an expert."""
    if len(importance) == 1:
        return importance
    return importance[np.arange(block.first, block.first + len(block.weights)) // height]


def _check_finite(block: RowBlock, layer: Layer) -> None:
    finite = np.isfinite(block.weights)
    if not finite.all():
        tensor = layer.weight
        row, column = np.argwhere(~finite)[0]
        raise SourceError(
            f"{tensor.file.name}: tensor {tensor.name!r} holds {block.weights[row, column]} at "
            f"row {block.first + row}, column {column}; only finite weights can be sketched "
            f"(--ignore {layer.name} leaves the layer dense)"
        )
