"""Codes chosen column by column, each making up for the error of those before, in numba and BLAS.

GPTQ's assignment (arXiv 2210.17323) in the form that `hessian.py` derives. Columns are taken in
blocks: inside a block a row is worked off alone, in the cache; what the block left behind reaches
the columns after it in one matrix product.
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

#: Columns per block.
_BLOCK = 128


def compensate(weights: Singles, table: Singles, hessian: PreparedHessian) -> Codes:
    """Codes, uint8 [rows, n], chosen greedily in the order of the Hessian's columns.

    weights: float32 [rows, n]; table: float32 [rows, groups, entries], ascending. Each column takes
    the entry nearest to its weight after compensation, the lower code of two as near. Raises
    ValueError for shapes that do not match.
    """
    check_shapes(weights, table, None, hessian.columns)
    rows, n = weights.shape
    weights, table = np.ascontiguousarray(weights), np.ascontiguousarray(table)
    codes = np.empty((rows, n), np.uint8)
    shift = np.zeros((rows, n), np.float32)
    for first in range(0, n, _BLOCK):
        last = min(first + _BLOCK, n)
        moved = np.empty((rows, last - first), np.float32)
        block = np.ascontiguousarray(hessian.factor[first:last, first:last])
        order = hessian.order[first:last]
        _choose_block(weights, table, order, block, shift[:, first:last], codes, moved)
        shift[:, last:] += moved @ hessian.factor[first:last, last:]
    return codes


@numba.njit(cache=True, parallel=True, nogil=True)
def _choose_block(
    weights: Singles,
    table: Singles,
    order: npt.NDArray[np.int64],
    factor: Singles,
    shift: Singles,
    codes: Codes,
    moved: Singles,
) -> None:
    """Chooses the codes of a block; `moved` gets how far each weight moved, in order."""
    rows, groups, entries = table.shape
    width = weights.shape[1] // groups
    n = len(order)
    for row in numba.prange(rows):
        middles = np.empty((groups, entries - 1), np.float32)
        fill_middles(table[row], middles)
        line = shift[row]
        for k in range(n):
            column = order[k]
            group = column // width
            weight = weights[row, column]
            code = nearest(weight - line[k], middles[group])
            step = table[row, group, code] - weight
            codes[row, column] = code
            moved[row, k] = step
            for i in range(k + 1, n):
                line[i] += step * factor[k, i]
