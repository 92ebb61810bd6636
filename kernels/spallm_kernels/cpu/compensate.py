"""Codes chosen column by column, each making up for the error of those before, in numba.

GPTQ's assignment (arXiv 2210.17323) in the form that `hessian.py` derives. Columns are taken in
blocks: inside a block a row is worked off alone, in the cache; what the block left behind reaches
the columns after it in one product. That product is ours, since the bits of a library's depend on
its threads; every sum here has a fixed order.
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

#: Columns per block, a multiple of four, and how many of those after it are served at a time.
_BLOCK = 128
_TILE = 1024
#: Rows that a thread takes through the columns together, so that they share the factor's lines.
_TOGETHER = 32


def compensate(weights: Singles, table: Singles, hessian: PreparedHessian) -> Codes:
    """Codes, uint8 [rows, n], chosen greedily in the order of the Hessian's columns.

    weights: float32 [rows, n]; table: float32 [rows, groups, entries], ascending. Each column takes
    the entry nearest to its weight after compensation, the lower code of two as near. Raises
    ValueError for shapes that do not match.
    """
    check_shapes(weights, table, None, hessian.columns)
    rows, n = weights.shape
    table = np.ascontiguousarray(table)
    # In the order of choice throughout: columns picked from all over a row would miss the cache.
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
    """Chooses the codes of a block; `moved` gets how far each weight moved."""
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
    """Adds moved @ factor to the columns from `last`, four rows of factor in one pass."""
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
