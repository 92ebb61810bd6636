"""Calibrated sketching in torch, all rows at once: for GPUs, where `cpu` works a row at a time.

The same algorithms under the same names as in `cpu`, which documents them; results differ by the
order of float32 sums. Clustering alone stays on the CPU, where it is exact and not what takes the
time. On a CUDA device, float32 products must not be rounded to TF32, which is torch's default
(`torch.backends.cuda.matmul.allow_tf32` false).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu.kmeans import kmeans

#: Columns that are worked off one by one before the others hear of it in one product.
_BLOCK = 128
#: Floats that temporaries of a block of rows may take.
_SCRATCH = 1 << 26


@dataclass(frozen=True, eq=False)
class PreparedHessian:
    """A damped Hessian and its factor, as `cpu.hessian.PreparedHessian`, on one device.

    full: float64 [n, n]; single: float32 [n, n]; order: int64 [n]; pivots: float64 [n]; factor:
    float32 [n, n].
    """

    full: Tensor
    single: Tensor
    order: Tensor
    pivots: Tensor
    factor: Tensor


def prepare_hessian(hessian: Tensor, damping: float) -> PreparedHessian:
    """Damps H [n, n], orders its columns and factors it, in float64 on its device.

    Raises ValueError for a matrix that is not square or finite, for damping not above 0, and where
    the damped matrix is not positive definite.
    """
    full = hessian.to(torch.float64, copy=True)
    if full.dim() != 2 or full.shape[0] != full.shape[1] or full.numel() == 0:
        raise ValueError(f"a Hessian must be [n, n], found {list(full.shape)}")
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping must be finite and above 0, found {damping}")
    if not bool(torch.isfinite(full).all()):
        raise ValueError("a Hessian must be finite")
    mean = full.diagonal().mean().item()
    full.diagonal().add_(damping * mean if mean else 1.0)
    order = full.diagonal().argsort(descending=True, stable=True)
    lower, failed = torch.linalg.cholesky_ex(full[order][:, order].flip(0, 1))
    if int(failed):
        raise ValueError(f"the Hessian is not positive definite with damping {damping}: use more")
    upper = lower.flip(0, 1)
    pivots = torch.empty_like(full[0])
    pivots[order] = upper.diagonal()
    factor = (upper / upper.diagonal()).triu(1).float().contiguous()
    return PreparedHessian(full, full.float(), order, pivots, factor)


def importance(hessian: PreparedHessian, power: float | None) -> Tensor:
    """Weights of the columns for clustering, float32 [1, n], the greatest 1."""
    values = hessian.full.diagonal() if power is None else hessian.pivots
    relative = (values / values.max()) ** (1.0 if power is None else power)
    return relative.float()[None]


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """Sketched weights [rows, n]: table [rows, groups, entries], codes uint8 [rows, n]."""
    grouped = codes.reshape(*table.shape[:2], -1).long()
    return table.gather(2, grouped).reshape(codes.shape)


def quadratic_loss(weights: Tensor, dense: Tensor, hessian: Tensor) -> Tensor:
    """(dense - weights) H (dense - weights)^T of every row: float64 [rows]. H is float64."""
    return _slopes_and_losses(weights, dense, hessian)[1]


def compensate(weights: Tensor, table: Tensor, hessian: PreparedHessian) -> Tensor:
    """Codes, uint8 [rows, n], chosen greedily in the order of the Hessian's columns.

    weights: float32 [rows, n]; table: float32 [rows, groups, entries], ascending.
    """
    rows, n = weights.shape
    width = n // table.shape[1]
    middles = _middles(table)
    order: list[int] = hessian.order.tolist()
    codes = torch.empty(rows, n, dtype=torch.uint8, device=weights.device)
    shift = torch.zeros_like(weights)
    for first in range(0, n, _BLOCK):
        last = min(first + _BLOCK, n)
        near = shift[:, first:last].clone()
        moved = torch.empty_like(near)
        factor = hessian.factor[first:last, first:last]
        for k, column in enumerate(order[first:last]):
            group, weight = column // width, weights[:, column]
            chosen = _nearest(weight - near[:, k], middles[:, group])
            codes[:, column] = chosen
            moved[:, k] = table[:, group].gather(1, chosen[:, None])[:, 0] - weight
            near[:, k + 1 :].addcmul_(moved[:, k, None], factor[k, None, k + 1 :])
        shift[:, last:] += moved @ hessian.factor[first:last, last:]
    return codes


def descend(
    weights: Tensor, table: Tensor, codes: Tensor, hessian: PreparedHessian, sweeps: int
) -> Tensor:
    """Codes, uint8 [rows, n], of no greater loss: at most `sweeps` passes over the columns.

    weights: float32 [rows, n]; table: float32 [rows, groups, entries], ascending; codes: uint8
    [rows, n], where to start.
    """
    dense = look_up(table, codes)
    slopes, losses = _slopes_and_losses(weights, dense, hessian.full)
    new = codes.clone()
    middles = _middles(table)
    for _ in range(sweeps):
        changed = torch.zeros((), dtype=torch.bool, device=codes.device)
        for first in range(0, weights.shape[1], _BLOCK):
            steps = _descend_block(table, middles, new, dense, slopes, hessian.single, first)
            slopes += steps @ hessian.single[first : first + _BLOCK]
            changed |= steps.any()
        if not bool(changed):
            break
    better = quadratic_loss(weights, dense, hessian.full) < losses
    return torch.where(better[:, None], new, codes)


def _descend_block(
    table: Tensor,
    middles: Tensor,
    codes: Tensor,
    dense: Tensor,
    slopes: Tensor,
    hessian: Tensor,
    first: int,
) -> Tensor:
    """Steps, float32 [rows, columns], of the columns from `first`; updates codes and dense."""
    last = min(first + _BLOCK, codes.shape[1])
    width = codes.shape[1] // table.shape[1]
    near, steps = slopes[:, first:last].clone(), torch.empty_like(slopes[:, first:last])
    diagonal: list[float] = hessian.diagonal()[first:last].tolist()
    for k, column in enumerate(range(first, last)):
        group, old, slope = column // width, dense[:, column], near[:, k]
        chosen = _nearest(old - slope / diagonal[k], middles[:, group])
        step = table[:, group].gather(1, chosen[:, None])[:, 0] - old
        lower = step * (2 * slope + step * diagonal[k]) < 0
        step = torch.where(lower, step, 0)
        codes[:, column] = torch.where(lower, chosen.to(torch.uint8), codes[:, column])
        steps[:, k] = step
        near.addcmul_(step[:, None], hessian[column, None, first:last])
        dense[:, column] = table[:, group].gather(1, codes[:, column, None].long())[:, 0]
    return steps


def least_squares(
    weights: Tensor, table: Tensor, codes: Tensor, hessian: PreparedHessian, ridge: float = 1e-9
) -> tuple[Tensor, Tensor]:
    """Tables, float32 [rows, groups, entries], ascending, and the codes that go with them.

    weights: float32 [rows, n]; table: float32 [rows, groups, entries]; codes: uint8 [rows, n]. A
    row that would lose more is left as it is.
    """
    rows, groups, entries = table.shape
    slopes, losses = _slopes_and_losses(weights, look_up(table, codes), hessian.full)
    steps = torch.empty(rows, groups * entries, dtype=torch.float64, device=table.device)
    together = max(1, _SCRATCH // (groups * entries * weights.shape[1]))
    for first in range(0, rows, together):
        some = slice(first, first + together)
        steps[some] = _solve(codes[some], slopes[some], hessian.single, groups, entries, ridge)
    moved = (table.double() + steps.reshape(table.shape)).float()
    new, order = moved.sort(dim=2, stable=True)
    names = order.argsort(dim=2).to(torch.uint8)
    renamed = look_up(names, codes)
    better = quadratic_loss(weights, look_up(new, renamed), hessian.full) < losses
    return (
        torch.where(better[:, None, None], new, table),
        torch.where(better[:, None], renamed, codes),
    )


def _solve(
    codes: Tensor, slopes: Tensor, hessian: Tensor, groups: int, entries: int, ridge: float
) -> Tensor:
    """Changes of the tables of some rows, float64 [rows, groups * entries]; 0 where unsolvable."""
    rows, n = codes.shape
    grouped = codes.reshape(rows, groups, 1, -1)
    names = torch.arange(entries, device=codes.device)[:, None]
    choice = (grouped == names).float()  # [rows, groups, entries, width]
    rows_of_h = hessian.reshape(groups, n // groups, n)
    sums = torch.einsum("rgew,gwn->rgen", choice, rows_of_h).reshape(rows, groups * entries, n)
    per_group = sums.reshape(rows, groups * entries, groups, -1).double()
    normal = torch.einsum("rugw,rgew->ruge", per_group, choice.double()).reshape(
        rows, groups * entries, -1
    )
    normal = (normal + normal.mT) / 2
    along = slopes.double().reshape(rows, groups, -1)
    right = -torch.einsum("rgew,rgw->rge", choice.double(), along)
    normal.diagonal(dim1=1, dim2=2).add_(
        ridge * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    )
    lower, failed = torch.linalg.cholesky_ex(normal)
    lower = torch.where(failed[:, None, None] > 0, torch.eye(lower.shape[1]).to(lower), lower)
    steps = torch.cholesky_solve(right.reshape(rows, -1, 1), lower)[:, :, 0]
    return torch.where(failed[:, None] > 0, 0, steps)


class Fitted(NamedTuple):
    """What `fit` returns: tensors, otherwise as `cpu.calibrated.Fitted`."""

    table: Tensor
    codes: Tensor
    losses: list[tuple[str, float]]


def fit(
    weights: Tensor,
    hessian: PreparedHessian,
    groups: int,
    entries: int,
    *,
    powers: Sequence[float | None] = (2.5, None),
    compensation: bool = True,
    refit: bool = True,
    rounds: int = 5,
    sweeps: int = 3,
    tolerance: float = 3e-3,
) -> Fitted:
    """Sketches rows such that their loss by a Hessian is small; `cpu.calibrated.fit` has the terms.

    weights: float32 [rows, n], finite.
    """
    best: _Sketched | None = None
    steps: list[tuple[str, float]] = []
    for power in powers:
        table = _cluster(weights, importance(hessian, power), groups, entries)
        trials = [("k-means", _assign(weights, table))]
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
        active = active[before - best.losses[active] > tolerance * before]
        if len(active) == 0:
            break
    return Fitted(best.table, best.codes, steps)


def _cluster(weights: Tensor, importance: Tensor, groups: int, entries: int) -> Tensor:
    """Tables by k-means, float32 [rows, groups, entries], ascending."""
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
    """Every step's name and the rows after it."""

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


def _assign(weights: Tensor, table: Tensor) -> Tensor:
    """Codes, uint8 [rows, n], of the nearest entries."""
    grouped = weights.reshape(*table.shape[:2], -1)
    codes = torch.zeros_like(grouped, dtype=torch.uint8)
    for middle in _middles(table).unbind(2):
        codes += grouped > middle[:, :, None]
    return codes.reshape(weights.shape)


def _slopes_and_losses(weights: Tensor, dense: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [rows, n] and float64 [rows], multiplied in float64, some rows at a time."""
    slopes = torch.empty_like(weights)
    losses = torch.empty(len(weights), dtype=torch.float64, device=weights.device)
    together = max(1, _SCRATCH // weights.shape[1])
    for first in range(0, len(weights), together):
        some = slice(first, first + together)
        moved = dense[some].double() - weights[some]
        product = moved @ hessian
        slopes[some] = product
        losses[some] = product.mul_(moved).sum(1)
    return slopes, losses


def _middles(table: Tensor) -> Tensor:
    """Middles between neighbouring entries, float32 [rows, groups, entries - 1]."""
    wide = table.double()
    return ((wide[:, :, :-1] + wide[:, :, 1:]) * 0.5).float()


def _nearest(values: Tensor, middles: Tensor) -> Tensor:
    """Codes, int64 [rows], of the entries nearest to values [rows], the lower one of two."""
    return (values[:, None] > middles).sum(1)
