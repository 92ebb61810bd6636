"""Cyclic coordinate descent on the codes of fixed tables, in numba.

LNQ's descent (GuidedQuant, arXiv 2505.07004): with all other columns fixed the loss of a row is a
parabola in one weight, so the best entry is the one nearest to its lowest point, q_j - G_j / H_jj
with G = (q - w) H. Only a code that changes costs more than a look: G moves along a row of H.
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

#: Rows that go through the columns together, so that they share a row of H in the cache.
_TOGETHER = 16


def descend(
    weights: Singles, table: Singles, codes: Codes, hessian: PreparedHessian, sweeps: int
) -> Codes:
    """Codes, uint8 [rows, n], of no greater loss: at most `sweeps` passes over the columns.

    weights: float32 [rows, n]; table: float32 [rows, groups, entries], ascending; codes: uint8
    [rows, n], where to start. A code changes only where that lowers the loss, which is that of the
    damped Hessian. Raises ValueError for shapes that do not match.
    """
    check_shapes(weights, table, codes, hessian.columns)
    start = measure(weights, table, codes, hessian.full)
    end = measure(weights, table, descend_from(start, hessian, sweeps), hessian.full)
    return keep_better(start, end).codes


def descend_from(start: Measured, hessian: PreparedHessian, sweeps: int) -> Codes:
    """Codes after the sweeps; rounding of slopes may have raised a loss by parts in a million."""
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
