"""State calibrated sketching as plainly as possible. The optimised version is `cpu/calibrated.py`.

Everything is computed in float64. H is [n, n] and already damped; `order` lists the columns in the
order in which their codes are chosen.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.uint8]


def damped(hessian: Floats, damping: float) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Damp a Hessian and order its columns.

    Args:
        hessian: H, float64 [n, n].
        damping: This fraction of the diagonal's mean is added to the diagonal.

    Returns:
        The damped H (the identity if H is zero), and its columns by descending diagonal, int64 [n].
    """
    mean = hessian.diagonal().mean()
    full = hessian + np.eye(len(hessian)) * (damping * mean if mean else 1.0)
    return full, np.argsort(-full.diagonal(), kind="stable")


def inverse_factor(hessian: Floats, order: npt.NDArray[np.int64]) -> Floats:
    """Return U, upper triangular, with U^T U the inverse of H in that order, as in GPTQ."""
    return np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)])).T


def look_up(table: npt.ArrayLike, codes: Codes) -> Floats:
    """Return the sketched weights, float64 [rows, n].

    Args:
        table: [rows, groups, entries].
        codes: uint8 [rows, n].
    """
    table = np.asarray(table, np.float64)
    grouped = codes.reshape(*table.shape[:2], -1).astype(int)
    return np.take_along_axis(table, grouped, axis=2).reshape(codes.shape)


def quadratic_loss(weights: npt.ArrayLike, dense: npt.ArrayLike, hessian: Floats) -> Floats:
    """Return (q - w) H (q - w)^T for every row, float64 [rows]; q is `dense`, w is `weights`."""
    moved = np.asarray(dense, np.float64) - np.asarray(weights, np.float64)
    return np.array([row @ hessian @ row for row in moved])


def compensate(
    weights: npt.ArrayLike, table: npt.ArrayLike, hessian: Floats, order: npt.NDArray[np.int64]
) -> Codes:
    """Choose codes column by column, as GPTQ does (arXiv 2210.17323).

    Each weight takes the nearest entry; its error is spread over the columns that follow.

    Args:
        weights: [rows, n].
        table: [rows, groups, entries].
        hessian: Damped H, float64 [n, n].
        order: Columns in the order of choice, int64 [n].

    Returns:
        Codes, uint8 [rows, n].
    """
    left, table = np.array(weights, np.float64), np.asarray(table, np.float64)
    width = left.shape[1] // table.shape[1]
    upper = inverse_factor(hessian, order)
    codes = np.empty(left.shape, np.uint8)
    for place, column in enumerate(order):
        entries = table[:, column // width]
        codes[:, column] = np.abs(entries - left[:, column, None]).argmin(axis=1)
        chosen = np.take_along_axis(entries, codes[:, column, None].astype(int), axis=1)[:, 0]
        error = (left[:, column] - chosen) / upper[place, place]
        left[:, order[place:]] -= error[:, None] * upper[place, place:]
    return codes


def descend(
    weights: npt.ArrayLike, table: npt.ArrayLike, codes: Codes, hessian: Floats, sweeps: int
) -> Codes:
    """Improve codes one column after another, with all other columns fixed.

    Args:
        weights: [rows, n].
        table: [rows, groups, entries].
        codes: Codes to start from, uint8 [rows, n].
        hessian: Damped H, float64 [n, n].
        sweeps: Passes over all columns.

    Returns:
        Codes, uint8 [rows, n].
    """
    weights, table = np.asarray(weights, np.float64), np.asarray(table, np.float64)
    codes = codes.copy()
    for _ in range(sweeps):
        for row in range(len(weights)):
            for column in range(weights.shape[1]):
                losses = []
                for entry in range(table.shape[2]):
                    trial = codes[row : row + 1].copy()
                    trial[0, column] = entry
                    dense = look_up(table[row : row + 1], trial)
                    losses.append(quadratic_loss(weights[row : row + 1], dense, hessian)[0])
                if min(losses) < losses[codes[row, column]]:
                    codes[row, column] = int(np.argmin(losses))
    return codes


def least_squares(
    weights: npt.ArrayLike, codes: Codes, table: npt.ArrayLike, hessian: Floats
) -> tuple[Floats, Codes]:
    """Return the tables of least loss for fixed codes.

    An entry that no code uses stays as it is. If there are several solutions, the one nearest to
    the old table is taken.

    Args:
        weights: [rows, n].
        codes: uint8 [rows, n].
        table: [rows, groups, entries].
        hessian: Damped H, float64 [n, n].

    Returns:
        Ascending tables, float64 [rows, groups, entries], and the codes renamed to match them.
    """
    weights, old = np.asarray(weights, np.float64), np.asarray(table, np.float64)
    rows, groups, entries = old.shape
    new, renamed = old.copy(), codes.copy()
    for row in range(rows):
        places = np.repeat(np.arange(groups), codes.shape[1] // groups) * entries + codes[row]
        choice = np.eye(groups * entries)[places]  # S: a row per column, with a single 1 in it
        error = weights[row] - choice @ old[row].ravel()
        step = np.linalg.lstsq(choice.T @ hessian @ choice, choice.T @ hessian @ error)[0]
        moved = old[row] + step.reshape(groups, entries)
        order = moved.argsort(axis=1, kind="stable")
        new[row] = np.take_along_axis(moved, order, axis=1)
        places_of = order.argsort(axis=1)
        grouped = codes[row].reshape(groups, -1).astype(int)
        renamed[row] = np.take_along_axis(places_of, grouped, axis=1).ravel()
    return new, renamed
