"""Improve the codes of fixed tables by cyclic coordinate descent, in numba.

This is LNQ's descent (GuidedQuant, arXiv 2505.07004). With all other columns fixed, the loss of a
row is a parabola in one weight. So the best entry is the one nearest to its lowest point, q_j - G_j
/ H_jj with G = (q - w) H. A code that stays costs only this test; a code that changes moves G along
a row of H.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from .hessian import PreparedHessian
from .nearest import fill_middles, nearest
from .quadratic import Measured, check_shapes, keep_better, measure

Singles = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

#: Rows that are processed together, so that they share a row of H in the cache.
_TOGETHER = 16


def descend(
    weights: Singles, table: Singles, codes: Codes, hessian: PreparedHessian, sweeps: int
) -> Codes:
    """Improve codes by coordinate descent; a code changes only if that lowers the loss.

    The loss is computed with the damped Hessian.

    Args:
        weights: float32 [rows, n].
        table: float32 [rows, groups, entries], ascending.
        codes: Codes to start from, uint8 [rows, n].
        hessian: Damped and factored Hessian of n columns, from `prepare_hessian`.
        sweeps: The most passes over all columns.

    Returns:
        Codes, uint8 [rows, n]. No row has a greater loss than before.

    Raises:
        ValueError: If the shapes do not match.
    """
    check_shapes(weights, table, codes, hessian.columns)
    start = measure(weights, table, codes, hessian.full)
    end = measure(weights, table, descend_from(start, hessian, sweeps), hessian.full)
    return keep_better(start, end).codes


def descend_from(start: Measured, hessian: PreparedHessian, sweeps: int) -> Codes:
    """Return the codes after the sweeps.

    Rounded slopes may raise a loss by a few parts in a million.
    """
    codes = start.codes.copy()
    _descend_rows(
        np.ascontiguousarray(start.table),
        codes,
        start.slopes.copy(),
        hessian.single,
        hessian.single.diagonal().copy(),
        sweeps,
    )
    return codes


@numba.njit(cache=True, parallel=True, nogil=True)
def _descend_rows(
    table: Singles,
    codes: Codes,
    slopes: Singles,
    hessian: Singles,
    diagonal: Singles,
    sweeps: int,
) -> None:
    rows, groups, entries = table.shape
    n = codes.shape[1]
    width = n // groups
    tasks = (rows + _TOGETHER - 1) // _TOGETHER
    for task in numba.prange(tasks):
        first, last = task * _TOGETHER, min((task + 1) * _TOGETHER, rows)
        middles = np.empty((last - first, groups, entries - 1), np.float32)
        for row in range(first, last):
            fill_middles(table[row], middles[row - first])
        for _ in range(sweeps):
            changes = 0
            for column in range(n):
                group = column // width
                for row in range(first, last):
                    old = table[row, group, codes[row, column]]
                    slope = slopes[row, column]
                    lowest = old - slope / diagonal[column]
                    code = nearest(lowest, middles[row - first, group])
                    step = table[row, group, code] - old
                    if step * (2 * slope + step * diagonal[column]) < 0:
                        codes[row, column] = code
                        changes += 1
                        line, along = slopes[row], hessian[column]
                        for i in range(n):
                            line[i] += step * along[i]
            if changes == 0:
                break
