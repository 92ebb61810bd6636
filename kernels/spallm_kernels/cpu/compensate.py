"""Choose codes column by column, each compensating the error of the columns before it, in numba.

This is GPTQ's assignment (arXiv 2210.17323) in the form that `hessian.py` derives. Columns are
processed in blocks. Inside a block, a row is processed alone, in the cache. Then one product
carries the error of the block to the columns after it. We compute that product ourselves, because
the bits of a library's product depend on its threads; here every sum has a fixed order.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from .hessian import PreparedHessian
from .nearest import fill_middles, nearest
from .quadratic import check_shapes

Singles = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
Groups = npt.NDArray[np.int64]

#: Columns per block (a multiple of four), and later columns that are updated at a time.
_BLOCK = 128
_TILE = 1024
#: Rows that a thread processes together, so that they share lines of the factor in the cache.
_TOGETHER = 32


def compensate(weights: Singles, table: Singles, hessian: PreparedHessian) -> Codes:
    """Choose codes greedily, in the order of the Hessian's columns.

    Each column takes the entry nearest to its compensated weight; if two are as near, the lower
    code.

    Args:
        weights: float32 [rows, n].
        table: float32 [rows, groups, entries], ascending.
        hessian: Damped and factored Hessian of n columns, from `prepare_hessian`.

    Returns:
        Codes, uint8 [rows, n].

    Raises:
        ValueError: If the shapes do not match.
    """
    check_shapes(weights, table, None, hessian.columns)
    rows, n = weights.shape
    table = np.ascontiguousarray(table)
    # Reorder first: columns picked from all over a row would miss the cache.
    ordered = np.take(weights, hessian.order, axis=1)
    groups = hessian.order // (n // table.shape[1])
    chosen = np.empty((rows, n), np.uint8)
    _choose_rows(ordered, table, groups, hessian.factor, chosen)
    codes = np.empty_like(chosen)
    codes[:, hessian.order] = chosen
    return codes


@numba.njit(cache=True, parallel=True, nogil=True)
def _choose_rows(
    weights: Singles, table: Singles, group_of: Groups, factor: Singles, codes: Codes
) -> None:
    rows, n = weights.shape
    tasks = (rows + _TOGETHER - 1) // _TOGETHER
    for task in numba.prange(tasks):
        some = slice(task * _TOGETHER, min((task + 1) * _TOGETHER, rows))
        shift = np.zeros((some.stop - some.start, n), np.float32)
        moved = np.empty((some.stop - some.start, _BLOCK), np.float32)
        for first in range(0, n, _BLOCK):
            last = min(first + _BLOCK, n)
            _choose_block(
                weights[some], table[some], group_of, factor, first, last, shift, codes[some], moved
            )
            _push(moved, factor, first, last, shift)


@numba.njit(cache=True, nogil=True)
def _choose_block(
    weights: Singles,
    table: Singles,
    group_of: Groups,
    factor: Singles,
    first: int,
    last: int,
    shift: Singles,
    codes: Codes,
    moved: Singles,
) -> None:
    """Choose the codes of a block; write to `moved` how far each weight moved."""
    rows, groups, entries = table.shape
    middles = np.empty((groups, entries - 1), np.float32)
    for row in range(rows):
        fill_middles(table[row], middles)
        for place in range(first, last):
            group, weight = group_of[place], weights[row, place]
            code = nearest(weight - shift[row, place], middles[group])
            step = table[row, group, code] - weight
            codes[row, place] = code
            moved[row, place - first] = step
            later, along = shift[row, place + 1 : last], factor[place, place + 1 : last]
            for i in range(len(later)):
                later[i] += step * along[i]


@numba.njit(cache=True, nogil=True)
def _push(moved: Singles, factor: Singles, first: int, last: int, shift: Singles) -> None:
    """Add moved @ factor to the columns from `last` on, four rows of the factor per pass."""
    rows, n = shift.shape
    for start in range(last, n, _TILE):
        tile = slice(start, min(start + _TILE, n))
        for row in range(rows):
            line = shift[row, tile]
            for k in range(0, last - first, 4):
                a, b = moved[row, k], moved[row, k + 1]
                c, d = moved[row, k + 2], moved[row, k + 3]
                along_a, along_b = factor[first + k, tile], factor[first + k + 1, tile]
                along_c, along_d = factor[first + k + 2, tile], factor[first + k + 3, tile]
                for i in range(len(line)):
                    line[i] += (a * along_a[i] + b * along_b[i]) + (c * along_c[i] + d * along_d[i])
