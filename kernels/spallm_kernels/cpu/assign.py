"""Find the nearest table entry of every weight, and the error that remains, in numba."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

Singles = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]


def assign(weights: Singles, tables: Singles) -> Codes:
    """Return the code of the nearest entry for every weight.

    Args:
        weights: float32 [rows, columns].
        tables: float32 [rows, groups, entries], ascending.

    Returns:
        Codes, uint8 [rows, columns]. A weight halfway between two entries takes the lower code.

    Raises:
        ValueError: If the shapes do not match.
    """
    rows, groups, _ = tables.shape
    if len(weights) != rows or weights.shape[1] % groups:
        raise ValueError(
            f"weights must be [{rows}, a multiple of {groups}] for tables {tables.shape}, "
            f"found {weights.shape}"
        )
    codes = np.empty(weights.shape, np.uint8)
    _assign_rows(np.ascontiguousarray(weights), np.ascontiguousarray(tables), codes)
    return codes


def squared_error(
    weights: Singles, tables: Singles, codes: Codes, importance: Singles | None = None
) -> npt.NDArray[np.float64]:
    """Sum the squared error and the squared weights of each row.

    Args:
        weights: float32 [rows, columns].
        tables: float32 [rows, groups, entries].
        codes: uint8 [rows, columns].
        importance: How often each square counts, float32 [1 or rows, columns]. None: once.

    Returns:
        float64 [rows, 2]: the sums of (weight - table[code])^2 and of weight^2.
    """
    sums = np.empty((len(weights), 2))
    if importance is None:
        importance = np.ones((1, weights.shape[1]), np.float32)
    weights, tables = np.ascontiguousarray(weights), np.ascontiguousarray(tables)
    _sum_rows(weights, tables, codes, np.ascontiguousarray(importance), sums)
    return sums


@numba.njit(cache=True, parallel=True, nogil=True)
def _assign_rows(weights: Singles, tables: Singles, codes: Codes) -> None:
    rows, groups, entries = tables.shape
    width = weights.shape[1] // groups
    for row in numba.prange(rows):
        for group in range(groups):
            table = tables[row, group]
            columns = slice(group * width, (group + 1) * width)
            values, out = weights[row, columns], codes[row, columns]
            out[:] = 0
            # Comparing with every entry vectorises over the weights; bisection does not.
            for entry in range(entries - 1):
                middle = np.float32((np.float64(table[entry]) + np.float64(table[entry + 1])) * 0.5)
                for i in range(width):
                    out[i] += values[i] > middle


@numba.njit(cache=True, parallel=True, nogil=True)
def _sum_rows(
    weights: Singles,
    tables: Singles,
    codes: Codes,
    importance: Singles,
    sums: npt.NDArray[np.float64],
) -> None:
    rows, groups, _ = tables.shape
    width = weights.shape[1] // groups
    for row in numba.prange(rows):
        error = energy = 0.0
        counts = importance[min(np.int64(row), importance.shape[0] - 1)]
        for column in range(width * groups):
            value, count = np.float64(weights[row, column]), np.float64(counts[column])
            error += count * (value - tables[row, column // width, codes[row, column]]) ** 2
            energy += count * (value * value)
        sums[row, 0], sums[row, 1] = error, energy
