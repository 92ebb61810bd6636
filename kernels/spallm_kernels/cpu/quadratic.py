"""The quadratic loss of sketched rows, (q - w) H (q - w)^T, and its gradient."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

Singles = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.uint8]

#: Rows per matrix product, so that float64 copies of a large weight are never whole.
_BLOCK = 1024


def look_up(table: Singles, codes: Codes) -> Singles:
    """Sketched weights, float32 [rows, columns].

    table: float32 [rows, groups, entries]; codes: uint8 [rows, columns], below entries.
    """
    dense = np.empty(codes.shape, np.float32)
    _look_up_rows(np.ascontiguousarray(table), np.ascontiguousarray(codes), dense)
    return dense


def quadratic_loss(weights: Singles, dense: Singles, hessian: Floats) -> Floats:
    """(dense - weights) H (dense - weights)^T of every row: float64 [rows].

    weights, dense: float32 [rows, n]; hessian: float64 [n, n], symmetric.
    """
    if dense.shape != weights.shape or hessian.shape != (weights.shape[1],) * 2:
        raise ValueError(
            f"weights {weights.shape}, dense {dense.shape} and H {hessian.shape} do not match"
        )
    losses = np.empty(len(weights))
    for first in range(0, len(weights), _BLOCK):
        rows = slice(first, first + _BLOCK)
        moved = dense[rows].astype(np.float64) - weights[rows]
        losses[rows] = np.einsum("ij,ij->i", moved @ hessian, moved)
    return losses


def gradient(weights: Singles, table: Singles, codes: Codes, hessian: Floats) -> Singles:
    """Half the gradient of the loss by the sketched weights, (q - w) H: float32 [rows, n].

    Multiplied in float64: the sum of terms of both signs may be far below each of them.
    """
    dense = look_up(table, codes)
    for first in range(0, len(weights), _BLOCK):
        rows = slice(first, first + _BLOCK)
        moved = dense[rows].astype(np.float64) - weights[rows]
        dense[rows] = moved @ hessian
    return dense


def check_shapes(weights: Singles, table: Singles, codes: Codes | None, columns: int) -> None:
    """Raises ValueError for arrays of a layer that do not fit together."""
    fits = weights.ndim == 2 and table.ndim == 3 and len(weights) == len(table)
    if not fits or weights.shape[1] % table.shape[1] or not 1 <= table.shape[2] <= 256:
        raise ValueError(f"weights {weights.shape} and tables {table.shape} do not match")
    if weights.shape[1] != columns:
        raise ValueError(f"weights {weights.shape} do not match a Hessian of {columns} columns")
    if codes is not None and codes.shape != weights.shape:
        raise ValueError(f"weights {weights.shape} and codes {codes.shape} do not match")


@numba.njit(cache=True, parallel=True, nogil=True)
def _look_up_rows(table: Singles, codes: Codes, dense: Singles) -> None:
    rows, groups, _ = table.shape
    width = codes.shape[1] // groups
    for row in numba.prange(rows):
        for group in range(groups):
            for column in range(group * width, (group + 1) * width):
                dense[row, column] = table[row, group, codes[row, column]]
