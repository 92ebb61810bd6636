"""Sketch rows with calibration: find tables and codes that lose little on the layer's own inputs.

    k-means           tables, weighted by the columns' importance
    compensate        codes, column by column, each compensating earlier errors
    least squares     the best tables for these codes        } repeated while
    compensate        new codes for these tables             } the row still
    descend           better codes, one at a time            } improves

No step raises the loss of a row: a result that does not lower it is dropped. The result of a row
does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .assign import assign
from .compensate import compensate
from .descend import descend_from
from .hessian import PreparedHessian, importance
from .kmeans import kmeans
from .least_squares import solve_from
from .quadratic import Measured, check_columns, keep_better, measure

Singles = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

#: Powers of the pivots that weight the columns in clustering (None: the diagonal of H). Each row
#: continues from its best result.
POWERS = (2.5, None)
#: The most rounds that improve tables and codes in turn, and sweeps of descent in each round.
ROUNDS, SWEEPS = 5, 3
#: A row is finished when a round lowers its loss by less than this fraction.
TOLERANCE = 3e-3


class Fitted(NamedTuple):
    """Hold the result of `fit`.

    Attributes:
        table: float32 [rows, groups, entries], ascending.
        codes: uint8 [rows, n].
        losses: The name of every step, and the total loss of all rows after it, by the damped
            Hessian.
    """

    table: Singles
    codes: Codes
    losses: list[tuple[str, float]]


def fit(
    weights: Singles,
    hessian: PreparedHessian,
    groups: int,
    entries: int,
    *,
    powers: Sequence[float | None] = POWERS,
    compensation: bool = True,
    refit: bool = True,
    rounds: int = ROUNDS,
    sweeps: int = SWEEPS,
) -> Fitted:
    """Sketch rows so that their loss by a Hessian is small.

    Args:
        weights: float32 [rows, n], finite.
        hessian: Damped and factored Hessian of n columns, from `prepare_hessian`.
        groups: Tables per row; must divide n.
        entries: Entries per table.
        powers: Powers of the pivots that weight the columns in clustering (see `importance`). With
            several powers, each row continues from its best result.
        compensation: Whether each code compensates the errors of the codes before it.
        refit: Whether tables are solved by least squares.
        rounds: The most rounds of improvement. A row is finished earlier if a round lowers its loss
            by less than the fraction TOLERANCE.
        sweeps: Sweeps of coordinate descent per round; 0 for none.

    Returns:
        Tables, codes and losses.

    Raises:
        ValueError: If the shapes do not match, or `powers` is empty.
    """
    check_columns(weights, hessian.columns)
    best: Measured | None = None
    steps: list[tuple[str, float]] = []
    for power in powers:
        start = _start(weights, hessian, groups, entries, power)
        best = start if best is None else keep_better(best, start)
        steps.append(("k-means", float(best.losses.sum())))
        if compensation:
            codes = compensate(weights, start.table, hessian)
            best = keep_better(best, measure(weights, start.table, codes, hessian.full))
            steps.append(("compensate", float(best.losses.sum())))
    if best is None:
        raise ValueError("powers must name at least one power, found none")
    active = np.arange(len(weights))
    for _ in range(rounds):
        before = best.losses[active]
        part = best.take(active)
        for name, after in _round(weights[active], part, hessian, compensation, refit, sweeps):
            best.put(active, after)
            steps.append((name, float(best.losses.sum())))
        active = active[before - best.losses[active] > TOLERANCE * before]
        if len(active) == 0:
            break
    return Fitted(best.table, best.codes, steps)


def _start(
    weights: Singles, hessian: PreparedHessian, groups: int, entries: int, power: float | None
) -> Measured:
    """Compute tables by k-means and assign every weight to its nearest entry."""
    table = kmeans(weights, importance(hessian, power), groups, entries)[0].astype(np.float32)
    return measure(weights, table, assign(weights, table), hessian.full)


def _round(
    weights: Singles,
    state: Measured,
    hessian: PreparedHessian,
    compensation: bool,
    refit: bool,
    sweeps: int,
) -> Iterator[tuple[str, Measured]]:
    """Yield the name of every step and the rows after it."""

    def better(table: Singles, codes: Codes) -> Measured:
        return keep_better(state, measure(weights, table, codes, hessian.full))

    if refit:
        state = better(*solve_from(state, hessian))
        yield "least squares", state
        if compensation:
            state = better(state.table, compensate(weights, state.table, hessian))
            yield "compensate", state
    if sweeps:
        state = better(state.table, descend_from(state, hessian, sweeps))
        yield "descend", state
