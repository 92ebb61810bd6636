"""Sketch rows with calibration: the steps of `cpu.calibrated`, all rows at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spallm_kernels.cpu.calibrated import POWERS, ROUNDS, SWEEPS, TOLERANCE
from spallm_kernels.cpu.kmeans import kmeans

from .compensate import compensate
from .descend import descend
from .hessian import PreparedHessian, importance
from .least_squares import least_squares
from .nearest import assign
from .quadratic import look_up, quadratic_loss


class Fitted(NamedTuple):
    """Hold the result of `fit`, as `cpu.calibrated.Fitted` does, with tensors.

    Attributes:
        table: float32 [rows, groups, entries], ascending.
        codes: uint8 [rows, n].
        losses: The name of every step, and the total loss of all rows after it, by the damped
            Hessian.
    """

    table: Tensor
    codes: Tensor
    losses: list[tuple[str, float]]


def fit(
    weights: Tensor,
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

    `cpu.calibrated` describes the steps.

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
        ValueError: If the shapes do not match or `powers` is empty.
    """
    best: _Sketched | None = None
    steps: list[tuple[str, float]] = []
    for power in powers:
        table = _cluster(weights, importance(hessian, power), groups, entries)
        trials = [("k-means", assign(weights, table))]
        if compensation:
            trials.append(("compensate", compensate(weights, table, hessian)))
        for name, codes in trials:
            trial = _measured(weights, table, codes, hessian)
            best = trial if best is None else _better(best, trial)
            steps.append((name, float(best.losses.sum())))
    if best is None:
        raise ValueError("powers must name at least one power, found none")
    active = torch.arange(len(weights), device=weights.device)
    for _ in range(rounds):
        before = best.losses[active]
        part = _Sketched(*(whole[active] for whole in best))
        for name, after in _round(weights[active], part, hessian, compensation, refit, sweeps):
            for whole, rows in zip(best, after, strict=True):
                whole[active] = rows
            steps.append((name, float(best.losses.sum())))
        active = active[before - best.losses[active] > TOLERANCE * before]
        if len(active) == 0:
            break
    return Fitted(best.table, best.codes, steps)


def _cluster(weights: Tensor, importance: Tensor, groups: int, entries: int) -> Tensor:
    """Return tables by k-means, float32 [rows, groups, entries], ascending."""
    table, _ = kmeans(weights.cpu().numpy(), importance.cpu().numpy(), groups, entries)
    return torch.from_numpy(table).float().to(weights.device)


class _Sketched(NamedTuple):
    table: Tensor
    codes: Tensor
    losses: Tensor


def _round(
    weights: Tensor,
    state: _Sketched,
    hessian: PreparedHessian,
    compensation: bool,
    refit: bool,
    sweeps: int,
) -> Iterator[tuple[str, _Sketched]]:
    """Yield the name of every step and the rows after it."""

    def better(table: Tensor, codes: Tensor) -> _Sketched:
        return _better(state, _measured(weights, table, codes, hessian))

    if refit:
        state = better(*least_squares(weights, state.table, state.codes, hessian))
        yield "least squares", state
        if compensation:
            state = better(state.table, compensate(weights, state.table, hessian))
            yield "compensate", state
    if sweeps:
        state = better(state.table, descend(weights, state.table, state.codes, hessian, sweeps))
        yield "descend", state


def _measured(weights: Tensor, table: Tensor, codes: Tensor, hessian: PreparedHessian) -> _Sketched:
    losses = quadratic_loss(weights, look_up(table, codes), hessian.full)
    return _Sketched(table.clone(), codes, losses)


def _better(old: _Sketched, new: _Sketched) -> _Sketched:
    better = new.losses < old.losses
    return _Sketched(
        torch.where(better[:, None, None], new.table, old.table),
        torch.where(better[:, None], new.codes, old.codes),
        torch.where(better, new.losses, old.losses),
    )
