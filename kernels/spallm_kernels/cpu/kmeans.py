"""Compute exact weighted 1-D k-means over the rows of a weight matrix, in numba.

Each group of a row is sorted and equal values are merged (4096 bf16 weights hold about 1,400
distinct values). Then the optimal partition into intervals is found in one of two ways:

* `penalised_partition`: a few passes over the values, for almost every row.
* `layered_partition`: slower; for few values, for ties, and if the error is so small compared with
  the values that float64 prefix sums cannot tell partitions apart.

Both are exact. The values alone decide which one runs, so results do not depend on threads.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from .layered_partition import layered_partition
from .penalised_partition import penalised_partition, prefix_sums
from .sorting import sort_with_payload

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int32]

#: Up to this many distinct values the layered way is used: it is cheap there and always decides.
_FEW_VALUES = 48
#: The smallest error, as a fraction of the values' second moment, that prefix sums resolve. Prefix
#: sums of n values are accurate to about 1e-15 of the moment, so partitions are told apart to 1e-10
#: of the error.
_RESOLVED = 1e-5
#: The lightest mass, as a fraction of the total, that prefix sums resolve to about 1e-7 of itself.
_LIGHT = 1e-9
_TASKS = 64


def kmeans(
    weights: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32],
    groups: int,
    entries: int,
) -> tuple[Floats, Floats]:
    """Compute the tables of each row that minimise the weighted squared error.

    Args:
        weights: float32 [rows, columns], finite.
        importance: float32 [1 or rows, columns], finite and non-negative. If it is zero in a whole
            group, that group counts as uniform.
        groups: Number of equal groups that each row is cut into; must divide the columns.
        entries: Entries per table.

    Returns:
        Ascending tables, float64 [rows, groups, entries], and the error of each table, float64
        [rows, groups]. If a group has fewer distinct values than entries, its last value is
        repeated.

    Raises:
        ValueError: If the shapes do not match or a value is out of range.
    """
    rows, columns = weights.shape
    if columns == 0 or columns % groups:
        raise ValueError(f"groups must divide the columns, found {groups} and {columns}")
    if importance.shape not in {(1, columns), (rows, columns)}:
        raise ValueError(
            f"importance must be [1 or {rows}, {columns}], found {list(importance.shape)}"
        )
    if not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise ValueError("importance must be finite and non-negative, found other values")
    if not np.isfinite(weights).all():
        raise ValueError("weights must be finite, found NaN or infinite values")
    tables = np.empty((rows, groups, entries))
    errors = np.empty((rows, groups))
    _kmeans_rows(
        np.ascontiguousarray(weights, np.float32),
        np.ascontiguousarray(importance, np.float32),
        tables,
        errors,
    )
    return tables, errors


@numba.njit(cache=True, parallel=True, nogil=True)
def _kmeans_rows(
    weights: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32],
    tables: Floats,
    errors: Floats,
) -> None:
    rows, groups, _ = tables.shape
    width = weights.shape[1] // groups
    # Scratch is allocated once per task; every row writes each value before it reads it.
    tasks = min(_TASKS, rows)
    for task in numba.prange(tasks):
        keys = np.empty((2, width), np.uint32)
        payload = np.empty((2, width), np.float32)
        sums = np.empty((2, width + 1))
        best = np.empty(width + 1)
        links = np.empty((4, width + 1), np.int32)
        bounds = np.empty(tables.shape[2] + 1, np.int32)
        merged = np.empty((2, width))
        for row in range(task * rows // tasks, (task + 1) * rows // tasks):
            row_importance = importance[min(row, importance.shape[0] - 1)]
            for group in range(groups):
                columns = slice(group * width, (group + 1) * width)
                n = _distinct(weights[row, columns], row_importance[columns], keys, payload, merged)
                values, mass = merged[0, :n], merged[1, :n]
                _partition(values, mass, sums, best, links, bounds)
                errors[row, group] = _fill_table(values, mass, bounds, tables[row, group])


@numba.njit(cache=True, nogil=True)
def _distinct(
    values: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32],
    keys: npt.NDArray[np.uint32],
    payload: npt.NDArray[np.float32],
    merged: Floats,
) -> int:
    """Sort values, merge equal ones and drop those without importance; return how many remain."""
    ordered, weighting = sort_with_payload(values, importance, keys, payload)
    uniform = not importance.any()
    n = 0
    for i in range(len(ordered)):
        weight = 1.0 if uniform else np.float64(weighting[i])
        if weight == 0.0:
            continue
        value = np.float64(ordered[i])
        if n and value == merged[0, n - 1]:
            merged[1, n - 1] += weight
        else:
            merged[0, n] = value
            merged[1, n] = weight
            n += 1
    return n


@numba.njit(cache=True, nogil=True)
def _partition(
    values: Floats, mass: Floats, sums: Floats, best: Floats, links: Integers, bounds: Integers
) -> None:
    """Write the optimal interval bounds: cluster c holds values bounds[c] .. bounds[c + 1] - 1."""
    n, entries = len(values), len(bounds) - 1
    if n <= entries:
        for c in range(entries + 1):
            bounds[c] = min(c, n)
        return
    if n > max(_FEW_VALUES, entries) and mass.min() >= _LIGHT * mass.sum():
        moment = prefix_sums(values, mass, sums)
        if penalised_partition(n, moment, sums, best, links, bounds):
            error = 0.0
            for c in range(entries):
                error += _interval_error(values, mass, bounds[c], bounds[c + 1])
            if error >= _RESOLVED * moment:
                return
    layered_partition(values, mass, bounds)


@numba.njit(cache=True, nogil=True)
def _interval_error(values: Floats, mass: Floats, i: int, j: int) -> float:
    if j - i < 2:
        return 0.0
    mean = _interval_mean(values, mass, i, j)
    error = 0.0
    for t in range(i, j):
        error += mass[t] * (values[t] - mean) ** 2
    return error


@numba.njit(cache=True, nogil=True)
def _interval_mean(values: Floats, mass: Floats, i: int, j: int) -> float:
    total = linear = 0.0
    for t in range(i, j):
        total += mass[t]
        linear += mass[t] * (values[t] - values[i])
    return values[i] + linear / total


@numba.njit(cache=True, nogil=True)
def _fill_table(values: Floats, mass: Floats, bounds: Integers, table: Floats) -> float:
    """Write the means of the clusters, repeating the last for empty ones; return the error."""
    error = 0.0
    for c in range(len(table)):
        if bounds[c + 1] > bounds[c]:
            table[c] = _interval_mean(values, mass, bounds[c], bounds[c + 1])
            error += _interval_error(values, mass, bounds[c], bounds[c + 1])
        else:
            table[c] = table[c - 1]
    return error
