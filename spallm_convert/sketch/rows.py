"""Sketch rows of a weight: cluster or hash, assign codes, pack them, measure the error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spallm_formats import (
    TABLE_DTYPES,
    SketchedModule,
    SketchMetadata,
    from_float32,
    pack,
    row_bytes,
    to_float32,
)
from spallm_kernels import assign, hash_codes, hash_table, kmeans, squared_error

from .limits import Limit


@dataclass(frozen=True)
class SketchedRows:
    """Hold sketched rows.

    Attributes:
        index_map: Packed codes, uint8 [rows, row_bytes].
        table: Tables as they are stored on disk, [rows, groups, 2^bits].
        rounded: The same values in float32.
        sums: Squared error and squared norm of each row, float64 [rows, 2]. With importance, those
            that are weighted by it follow: [rows, 4].
        reduced: Number of table values that were reduced to the limit of the dtype that the model
            loads in.
    """

    index_map: npt.NDArray[np.uint8]
    table: npt.NDArray[Any]
    rounded: npt.NDArray[np.float32]
    sums: npt.NDArray[np.float64]
    reduced: int = 0


def sketch_rows(
    weights: npt.NDArray[np.float32],
    module: SketchedModule,
    metadata: SketchMetadata,
    first_row: int,
    limit: Limit | None = None,
    importance: npt.NDArray[np.float32] | None = None,
) -> SketchedRows:
    """Sketch rows of a module. Codes are chosen for the rounded tables, as they are stored.

    Args:
        weights: Weights of the rows, float32 [rows, in_features].
        module: The module.
        metadata: Mapping, table dtype and seed.
        first_row: Number of the first row in the module.
        limit: Limit of the dtype that the model loads in.
        importance: How much the squared error of each weight counts, float32 [1 or rows,
            in_features], for the mapping "cluster". None: all alike.

    Returns:
        The sketched rows.

    Raises:
        ValueError: If weights are not finite and the mapping is "cluster".
        OverflowError: If weights are not finite and the mapping is "hash", or if a value of a table
            is too large for the table dtype or beyond the limit.
    """
    groups, bits = module.groups_per_row, module.bits
    if metadata.mapping == "hash":
        seed = metadata.hash_seed
        codes = hash_codes(len(weights), module.in_features, bits, seed, first_row)
        wide = hash_table(weights, groups, bits, seed, first_row)
        return store_rows(weights, wide, lambda _: codes, module, metadata, first_row, limit)
    alike = np.ones((1, module.in_features), np.float32)
    wide, _ = kmeans(weights, alike if importance is None else importance, groups, module.entries)
    nearest = functools.partial(assign, weights)
    return store_rows(weights, wide, nearest, module, metadata, first_row, limit, importance)


def store_rows(
    weights: npt.NDArray[np.float32],
    table: npt.NDArray[np.floating],
    choose: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.uint8]],
    module: SketchedModule,
    metadata: SketchMetadata,
    first_row: int = 0,
    limit: Limit | None = None,
    importance: npt.NDArray[np.float32] | None = None,
) -> SketchedRows:
    """Round tables to their stored dtype, choose codes for the rounded tables, and pack them.

    Args:
        weights: Weights of the rows, float32 [rows, in_features].
        table: Tables, [rows, groups, 2^bits].
        choose: Function from rounded tables of this shape to codes, [rows, in_features].
        module: The module.
        metadata: Mapping and table dtype.
        first_row: Number of the first row in the module, for the message.
        limit: Limit of the dtype that the model loads in. Table values beyond it are reduced to it
            if the weights of their row are within it.
        importance: What the additional sums of squares are weighted by. None: there are none.

    Returns:
        The sketched rows.

    Raises:
        OverflowError: If a value of a table is too large for the table dtype, or if weights of its
            row are beyond the limit too.
    """
    dtype = TABLE_DTYPES[metadata.table_dtype]
    stored = from_float32(table, dtype)
    rounded = _widened(stored, dtype)
    held = np.isfinite(rounded).all(axis=(1, 2))
    if not held.all():
        row = first_row + int(np.argmin(held))
        raise OverflowError(f"values in row {row} that {metadata.table_dtype} tables cannot hold")
    reduced = 0
    if limit is not None:
        over = np.abs(rounded) > limit.largest_entry
        reduced = int(over.sum())
        if reduced:
            _check_weights(weights, np.asarray(over.any(axis=(1, 2))), limit, first_row)
            within = np.clip(rounded, -limit.largest_entry, limit.largest_entry)
            stored, rounded = from_float32(within, dtype), within
    codes = choose(rounded)
    if metadata.mapping == "hash":
        index_map = np.empty((len(weights), 0), np.uint8)
    else:
        index_map = pack(codes, module.bits)
        assert index_map.shape[1] == row_bytes(module.in_features, module.bits)
    sums = squared_error(weights, rounded, codes)
    if importance is not None:
        weighted = squared_error(weights, rounded, codes, importance)
        sums = np.concatenate([sums, weighted], axis=1)
    return SketchedRows(index_map, stored, rounded, sums, reduced)


def reduction_note(name: str, count: int, limit: Limit) -> str:
    """Return a remark on table values that were reduced.

    Args:
        name: Name of the module.
        count: Number of its table values that were reduced.
        limit: Limit of the dtype that the model loads in.
    """
    return (
        f"{name}: {count:,} table values reduced to {limit.largest_entry:,.0f}, because the model "
        f"loads in {limit.dtype}"
    )


def _check_weights(
    weights: npt.NDArray[np.float32], rows: npt.NDArray[np.bool_], limit: Limit, first_row: int
) -> None:
    """Raise OverflowError if weights of some rows are beyond the limit."""
    beyond = rows & ~limit.finite_rows(weights)
    if beyond.any():
        row = first_row + int(np.argmax(beyond))
        raise OverflowError(
            f"weights in row {row} beyond {limit.largest:,.0f}, which are infinite in "
            f"{limit.dtype}, the dtype of the model in its config"
        )


def _widened(table: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    return to_float32(table.tobytes(), dtype).reshape(table.shape)
