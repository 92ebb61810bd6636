"""Write shards: copy dense tensors, and sketch linear weights in blocks of rows.

Memory does not depend on the size of the model, because one block of one tensor is held at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from spallm_convert.calibration.store import CalibratedModules, are_sums
from spallm_convert.errors import SourceError, SpallmError
from spallm_convert.progress import Progress
from spallm_convert.sketch.plan import Plan
from spallm_convert.sketch.rows import reduction_note, sketch_rows
from spallm_convert.source.reading import read_rows, read_stored
from spallm_formats import (
    INDEX_MAP_SUFFIX,
    TABLE_SUFFIX,
    Shard,
    ShardFile,
    Staging,
    StoredTensor,
)

#: Weights that are sketched at a time, enough for all cores, and bytes that are copied at a time.
BLOCK_WEIGHTS = 1 << 23
_BLOCK_BYTES = 1 << 26
_Read = TypeVar("_Read")


def write_shard(
    staging: Staging,
    shard: Shard,
    plan: Plan,
    sketches: CalibratedModules | None,
    progress: Progress,
    check: Callable[[], None],
) -> dict[str, Any]:
    """Write a shard.

    Args:
        staging: Output folder.
        shard: The planned shard.
        plan: Plan of the conversion.
        sketches: Calibrated modules. None: modules are sketched here, from their weights alone.
        progress: Told about every block that is sketched here.
        check: Called when the shard's tensors have been read. If it raises an error because the
            source has changed, the shard is not kept.

    Returns:
        Record of the shard, with the squared error and squared norm of each of its modules under
        `modules`.

    Raises:
        SourceError: If weights are not finite or do not fit the tables' dtype, or the source
            changed during the conversion.
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
        check()
    return record


def kept_record(
    staging: Staging, shard: Shard, plan: Plan, *, calibrated: bool
) -> dict[str, Any] | None:
    """Return the record of a shard that an earlier run wrote, None if it must be written again.

    Args:
        staging: Output folder.
        shard: The planned shard.
        plan: Plan of the conversion.
        calibrated: Whether its modules are calibrated, and have sums of outputs too.
    """
    record = staging.record(shard)
    if record is None or record.get("bytes") != shard.nbytes:
        return None
    names = {name for name in plan.layers if name + TABLE_SUFFIX in shard.tensors}
    sums = record.get("modules")
    if not are_sums(sums, 4 if calibrated else 2) or sums.keys() != names:
        return None
    return record


def _copy(tensor: StoredTensor, file: ShardFile) -> None:
    for start in range(0, tensor.nbytes, _BLOCK_BYTES):
        stop = min(start + _BLOCK_BYTES, tensor.nbytes)
        file.write(tensor.name, start, _read(read_stored, tensor, start, stop))


def _store(name: str, sketches: CalibratedModules, file: ShardFile) -> Sequence[float]:
    """Write a calibrated module; return its sums."""
    module = sketches.read(name)
    if module.index_map.size:
        file.write(name + INDEX_MAP_SUFFIX, 0, module.index_map)
    file.write(name + TABLE_SUFFIX, 0, module.table)
    return module.sums


def _sketch(name: str, plan: Plan, file: ShardFile, progress: Progress) -> tuple[float, float]:
    """Sketch and write one module; return its squared error and squared norm."""
    module, tensor = plan.layers[name].module, plan.layers[name].weight
    step = max(1, BLOCK_WEIGHTS // module.in_features)
    sums, reduced = [], 0
    for first in range(0, module.out_features, step):
        rows = min(step, module.out_features - first)
        weights = _read(read_rows, tensor, first, first + rows)
        _check_finite(weights, tensor, first)
        try:
            sketched = sketch_rows(weights, module, plan.metadata, first, plan.limit)
        except OverflowError as error:
            raise SourceError(
                f"{tensor.file.name}: tensor {tensor.name!r} has {error}; use --table-dtype float32"
            ) from error
        index_map, table = sketched.index_map, sketched.table
        if index_map.size:
            file.write(name + INDEX_MAP_SUFFIX, first * index_map.shape[1], index_map)
        file.write(name + TABLE_SUFFIX, first * table[0].nbytes, table)
        sums.append(sketched.sums)
        reduced += sketched.reduced
        progress.advance(weights.size, name)
    if plan.limit is not None and reduced:
        progress.remark(reduction_note(name, reduced, plan.limit))
    errors, norms = np.concatenate(sums).T
    return math.fsum(errors), math.fsum(norms)  # exact, so the size of blocks does not matter


def _read(
    reader: Callable[[StoredTensor, int, int], _Read], tensor: StoredTensor, start: int, stop: int
) -> _Read:
    try:
        return reader(tensor, start, stop)
    except SpallmError as error:
        raise SourceError(f"{error} (the source changed during the conversion)") from error


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
