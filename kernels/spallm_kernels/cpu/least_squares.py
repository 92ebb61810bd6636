"""Solve for the best tables of fixed codes, all groups of a row together, in numba.

With q = S t the loss is smallest where (S^T H S) t = S^T H w. The change of t is solved for, not t
itself, so that rounding in S^T H S scales the step and not the table.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from .hessian import PreparedHessian
from .quadratic import Measured, check_shapes, keep_better, measure

Singles = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.uint8]

#: This fraction of the mean diagonal of S^T H S is added to its diagonal.
RIDGE = 1e-9
#: Columns of H and rows of weights that are processed together, so that they stay in the cache.
_TILE = 256
_TOGETHER = 8


def least_squares(
    weights: Singles, table: Singles, codes: Codes, hessian: PreparedHessian
) -> tuple[Singles, Codes]:
    """Return the tables of least loss for fixed codes.

    The loss uses the damped Hessian. To it is added, for every entry, RIDGE times the mean diagonal
    of S^T H S times the squared distance from the old entry, so an entry that no code uses stays.
    Entries are sorted afterwards and codes renamed. A row whose loss would rise stays as it is.

    Args:
        weights: float32 [rows, n].
        table: float32 [rows, groups, entries], ascending.
        codes: uint8 [rows, n].
        hessian: Damped and factored Hessian of n columns, from `prepare_hessian`.

    Returns:
        Ascending tables, float32 [rows, groups, entries], and the codes that match them, uint8
        [rows, n].

    Raises:
        ValueError: If the shapes do not match.
    """
    check_shapes(weights, table, codes, hessian.columns)
    start = measure(weights, table, codes, hessian.full)
    end = measure(weights, *solve_from(start, hessian), hessian.full)
    best = keep_better(start, end)
    return best.table, best.codes


def solve_from(start: Measured, hessian: PreparedHessian) -> tuple[Singles, Codes]:
    """Return the tables and codes of least loss. If the gain is tiny, rounding may raise it."""
    table, codes = start.table.copy(), start.codes.copy()
    _solve_rows(table, codes, start.slopes, hessian.single, RIDGE)
    return table, codes


@numba.njit(cache=True, parallel=True, nogil=True)
def _solve_rows(
    table: Singles, codes: Codes, slopes: Singles, hessian: Singles, ridge: float
) -> None:
    rows, groups, entries = table.shape
    unknowns = groups * entries
    width = codes.shape[1] // groups
    tasks = (rows + _TOGETHER - 1) // _TOGETHER
    for task in numba.prange(tasks):
        first, last = task * _TOGETHER, min((task + 1) * _TOGETHER, rows)
        normal = np.zeros((last - first, unknowns, unknowns))
        _add_normal(codes[first:last], hessian, width, entries, normal)
        for row in range(first, last):
            right = np.zeros(unknowns)
            for column in range(codes.shape[1]):
                right[column // width * entries + codes[row, column]] -= slopes[row, column]
            if _solve(normal[row - first], right, ridge):
                for group in range(groups):
                    for entry in range(entries):
                        table[row, group, entry] += right[group * entries + entry]
            for group in range(groups):
                _sort_table(table[row, group], codes[row, group * width : (group + 1) * width])


@numba.njit(cache=True, nogil=True)
def _add_normal(codes: Codes, hessian: Singles, width: int, entries: int, normal: Floats) -> None:
    """Add S^T H S of some rows, from the upper half of H; the transpose is added at the end."""
    rows, n = codes.shape
    unknowns = normal.shape[1]
    sums = np.empty((rows, unknowns, _TILE), np.float32)
    for start in range(0, n, _TILE):
        stop = min(start + _TILE, n)
        sums[:] = 0
        for column in range(stop):
            along = hessian[column, start:stop]
            part = np.float32(0.5 if column >= start else 1.0)
            base = column // width * entries
            for row in range(rows):
                line = sums[row, base + codes[row, column]]
                for i in range(stop - start):
                    line[i] += part * along[i]
        for row in range(rows):
            for unknown in range(unknowns):
                for i in range(start, stop):
                    other = i // width * entries + codes[row, i]
                    normal[row, unknown, other] += sums[row, unknown, i - start]
    for row in range(rows):
        for i in range(unknowns):
            for j in range(i + 1):
                total = normal[row, i, j] + normal[row, j, i]
                normal[row, i, j] = normal[row, j, i] = total


@numba.njit(cache=True, nogil=True)
def _solve(matrix: Floats, right: Floats, ridge: float) -> bool:
    """Solve (matrix + ridge) x = right in place by Cholesky; return False if it is not definite."""
    n = len(right)
    trace = 0.0
    for i in range(n):
        trace += matrix[i, i]
    for i in range(n):
        matrix[i, i] += ridge * trace / n
    for i in range(n):
        for j in range(i + 1):
            value = matrix[i, j]
            for k in range(j):
                value -= matrix[i, k] * matrix[j, k]
            if j < i:
                matrix[i, j] = value / matrix[j, j]
            elif value > 0:
                matrix[i, i] = np.sqrt(value)
            else:
                return False
    for i in range(n):
        for k in range(i):
            right[i] -= matrix[i, k] * right[k]
        right[i] /= matrix[i, i]
    for i in range(n - 1, -1, -1):
        for k in range(i + 1, n):
            right[i] -= matrix[k, i] * right[k]
        right[i] /= matrix[i, i]
    return True


@numba.njit(cache=True, nogil=True)
def _sort_table(table: Singles, codes: Codes) -> None:
    """Sort the entries of one group by insertion, and rename its codes."""
    entries = len(table)
    order = np.arange(entries)
    for i in range(1, entries):
        value, name, place = table[i], order[i], i
        while place > 0 and table[place - 1] > value:
            table[place], order[place] = table[place - 1], order[place - 1]
            place -= 1
        table[place], order[place] = value, name
    names = np.empty(entries, np.uint8)
    for place in range(entries):
        names[order[place]] = place
    for i in range(len(codes)):
        codes[i] = names[codes[i]]
