"""Calibrated sketching of rows: tables and codes that lose little on the layer's own inputs.

    k-means           tables, by the columns' importance
    compensate        codes, column by column, each making up for those before
    least squares     the best tables for these codes        } in turn, as long as
    compensate        codes anew for these tables            } a row gains by it
    descend           better codes, one at a time            }

No step raises the loss of a row: what does not lower it is dropped. A row's result does not depend
on the rows beside it.
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

#: Of the pivots, for the importance of columns in clustering; each row goes on from the best.
POWERS = (2.5, None)
#: Times that tables and codes are improved in turn, at most, and sweeps of descent in each.
ROUNDS, SWEEPS = 5, 3
#: A row is done when a round lowered its loss by less than this part of it.
TOLERANCE = 3e-3


class Fitted(NamedTuple):
    """What `fit` returns.

    table: float32 [rows, groups, entries], ascending; codes: uint8 [rows, n]; losses: the name of
    every step and the loss of all rows after it, by the damped Hessian.
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
    """Sketches rows such that their loss by a Hessian is small.

    weights: float32 [rows, n], finite. powers: of the pivots, for the importance of columns in
    clustering (`importance`); with several, each row goes on from the best of them. compensation:
    whether codes make up for each other from the start. refit: whether tables are solved for.
    sweeps: of descent per round, 0 for none. A row is done after `rounds`, or when a round lowered
    its loss by less than TOLERANCE of it. Raises ValueError for shapes that do not match.
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
    """Tables by k-means, every weight at its nearest entry."""
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
    """Every step's name and the rows after it."""

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
