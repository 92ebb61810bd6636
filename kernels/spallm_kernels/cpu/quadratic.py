"""The quadratic loss of sketched rows, (q - w) H (q - w)^T, and its slope."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

Singles = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.intp]

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


class Measured(NamedTuple):
    """Sketched rows and what they lose.

    table: float32 [rows, groups, entries], ascending; codes: uint8 [rows, n]; slopes: float32
    [rows, n], (q - w) H, half the loss's gradient by the sketched weights; losses: float64 [rows].
    """

    table: Singles
    codes: Codes
    slopes: Singles
    losses: Floats

    def take(self, rows: Indices) -> Measured:
        """Copies of some rows."""
        return Measured(self.table[rows], self.codes[rows], self.slopes[rows], self.losses[rows])

    def put(self, rows: Indices, part: Measured) -> None:
        """Overwrites some rows."""
        self.table[rows], self.codes[rows] = part.table, part.codes
        self.slopes[rows], self.losses[rows] = part.slopes, part.losses


def measure(weights: Singles, table: Singles, codes: Codes, hessian: Floats) -> Measured:
    """Slopes and losses of sketched rows.

    Multiplied in float64: compensated errors cancel, so that a loss may be 1e-6 of its terms.
    """
    slopes, losses = look_up(table, codes), np.empty(len(weights))
    for first in range(0, len(weights), _BLOCK):
        rows = slice(first, first + _BLOCK)
        moved = slopes[rows].astype(np.float64) - weights[rows]
        product = moved @ hessian
        losses[rows] = np.einsum("ij,ij->i", product, moved)
        slopes[rows] = product
    return Measured(table, codes, slopes, losses)


def keep_better(old: Measured, new: Measured) -> Measured:
    """Row by row the one of less loss, the old one of two that lose the same."""
    kept = np.flatnonzero(~(new.losses < old.losses))  # a loss that is no number is not less
    if len(kept) == 0:
        return new
    best = new.take(np.arange(len(new.losses)))
    best.put(kept, old.take(kept))
    return best


def check_shapes(weights: Singles, table: Singles, codes: Codes | None, columns: int) -> None:
    """Raises ValueError for arrays of a layer that do not fit together."""
    fits = weights.ndim == 2 and table.ndim == 3 and len(weights) == len(table)
    if not fits or weights.shape[1] % table.shape[1] or not 1 <= table.shape[2] <= 256:
        raise ValueError(f"weights {weights.shape} and tables {table.shape} do not match")
    check_columns(weights, columns)
    if codes is not None and codes.shape != weights.shape:
        raise ValueError(f"weights {weights.shape} and codes {codes.shape} do not match")


def check_columns(weights: Singles, columns: int) -> None:
    """Raises ValueError for weights of another width than the Hessian's."""
    if weights.shape[1] != columns:
        raise ValueError(f"weights {weights.shape} do not match a Hessian of {columns} columns")


@numba.njit(cache=True, parallel=True, nogil=True)
def _look_up_rows(table: Singles, codes: Codes, dense: Singles) -> None:
    rows, groups, _ = table.shape
    width = codes.shape[1] // groups
    for row in numba.prange(rows):
        for group in range(groups):
            for column in range(group * width, (group + 1) * width):
                dense[row, column] = table[row, group, codes[row, column]]
