"""Compute the quadratic loss of sketched rows, (q - w) H (q - w)^T, and its slope."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

Singles = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.intp]

#: Rows per matrix product, so that a large weight is never copied to float64 as a whole.
_BLOCK = 1024


def look_up(table: Singles, codes: Codes) -> Singles:
    """Return the sketched weights.

    Args:
        table: float32 [rows, groups, entries].
        codes: uint8 [rows, columns], below entries.

    Returns:
        float32 [rows, columns].
    """
    dense = np.empty(codes.shape, np.float32)
    _look_up_rows(np.ascontiguousarray(table), np.ascontiguousarray(codes), dense)
    return dense


def quadratic_loss(weights: Singles, dense: Singles, hessian: Floats) -> Floats:
    """Return the loss (dense - weights) H (dense - weights)^T of every row.

    Args:
        weights: float32 [rows, n].
        dense: Sketched weights, float32 [rows, n].
        hessian: H, float64 [n, n], symmetric.

    Returns:
        float64 [rows].

    Raises:
        ValueError: If the shapes do not match.
    """
    if dense.shape != weights.shape or hessian.shape != (weights.shape[1],) * 2:
        raise ValueError(
            "weights and dense must be [rows, n] and H [n, n], "
            f"found {weights.shape}, {dense.shape} and {hessian.shape}"
        )
    losses = np.empty(len(weights))
    for first in range(0, len(weights), _BLOCK):
        rows = slice(first, first + _BLOCK)
        moved = dense[rows].astype(np.float64) - weights[rows]
        losses[rows] = np.einsum("ij,ij->i", moved @ hessian, moved)
    return losses


class Measured(NamedTuple):
    """Hold sketched rows and their losses.

    Attributes:
        table: float32 [rows, groups, entries], ascending.
        codes: uint8 [rows, n].
        slopes: (q - w) H, float32 [rows, n]; half the gradient of the loss by the sketched weights.
        losses: float64 [rows].
    """

    table: Singles
    codes: Codes
    slopes: Singles
    losses: Floats

    def take(self, rows: Indices) -> Measured:
        """Return copies of some rows."""
        return Measured(self.table[rows], self.codes[rows], self.slopes[rows], self.losses[rows])

    def put(self, rows: Indices, part: Measured) -> None:
        """Overwrite some rows."""
        self.table[rows], self.codes[rows] = part.table, part.codes
        self.slopes[rows], self.losses[rows] = part.slopes, part.losses


def measure(weights: Singles, table: Singles, codes: Codes, hessian: Floats) -> Measured:
    """Compute the slopes and losses of sketched rows.

    Products are in float64, because compensated errors cancel: a loss may be 1e-6 of its terms.

    Args:
        weights: float32 [rows, n].
        table: float32 [rows, groups, entries], ascending.
        codes: uint8 [rows, n].
        hessian: Damped H, float64 [n, n].

    Returns:
        Tables, codes, slopes and losses.
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
    """Return, for each row, the version with less loss; the old one if the losses are equal."""
    kept = np.flatnonzero(~(new.losses < old.losses))  # also if the new loss is NaN
    if len(kept) == 0:
        return new
    best = new.take(np.arange(len(new.losses)))
    best.put(kept, old.take(kept))
    return best


def check_shapes(weights: Singles, table: Singles, codes: Codes | None, columns: int) -> None:
    """Raise ValueError if the arrays of a layer do not match."""
    fits = weights.ndim == 2 and table.ndim == 3 and len(weights) == len(table)
    if not fits or weights.shape[1] % table.shape[1] or not 1 <= table.shape[2] <= 256:
        raise ValueError(
            "weights must be [rows, columns] and tables [rows, groups that divide the columns, "
            f"1 to 256 entries], found weights {weights.shape} and tables {table.shape}"
        )
    check_columns(weights, columns)
    if codes is not None and codes.shape != weights.shape:
        raise ValueError(
            "weights and codes must have the same shape, "
            f"found weights {weights.shape} and codes {codes.shape}"
        )


def check_columns(weights: Singles, columns: int) -> None:
    """Raise ValueError if weights have another width than the Hessian."""
    if weights.shape[1] != columns:
        raise ValueError(
            f"weights must be [rows, {columns}] for a Hessian of {columns} columns, "
            f"found {weights.shape}"
        )


@numba.njit(cache=True, parallel=True, nogil=True)
def _look_up_rows(table: Singles, codes: Codes, dense: Singles) -> None:
    rows, groups, _ = table.shape
    width = codes.shape[1] // groups
    for row in numba.prange(rows):
        for group in range(groups):
            for column in range(group * width, (group + 1) * width):
                dense[row, column] = table[row, group, codes[row, column]]
