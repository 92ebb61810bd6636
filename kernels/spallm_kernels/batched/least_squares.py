"""Solve for the best tables of fixed codes, all groups of a row together, many rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from spallm_kernels.cpu.least_squares import RIDGE

from . import quadratic
from .hessian import PreparedHessian
from .quadratic import look_up, quadratic_loss, slopes_and_losses


def least_squares(
    weights: Tensor, table: Tensor, codes: Tensor, hessian: PreparedHessian
) -> tuple[Tensor, Tensor]:
    """Return the tables of least loss for fixed codes; a row whose loss would rise stays as it is.

    Args:
        weights: float32 [rows, n].
        table: float32 [rows, groups, entries], ascending.
        codes: uint8 [rows, n].
        hessian: Damped and factored Hessian of n columns, from `prepare_hessian`.

    Returns:
        Ascending tables, float32 [rows, groups, entries], and the codes that match them, uint8
        [rows, n].
    """
    rows, groups, entries = table.shape
    slopes, losses = slopes_and_losses(weights, look_up(table, codes), hessian.full)
    steps = torch.empty(rows, groups * entries, dtype=torch.float64, device=table.device)
    together = max(1, quadratic.SCRATCH // (groups * entries * weights.shape[1]))
    for first in range(0, rows, together):
        some = slice(first, first + together)
        steps[some] = _solve(codes[some], slopes[some], hessian.single, groups, entries)
    moved = (table.double() + steps.reshape(table.shape)).float()
    new, order = moved.sort(dim=2, stable=True)
    names = order.argsort(dim=2).to(torch.uint8)
    renamed = look_up(names, codes)
    better = quadratic_loss(weights, look_up(new, renamed), hessian.full) < losses
    return (
        torch.where(better[:, None, None], new, table),
        torch.where(better[:, None], renamed, codes),
    )


def _solve(codes: Tensor, slopes: Tensor, hessian: Tensor, groups: int, entries: int) -> Tensor:
    """Return the changes of some rows' tables, float64 [rows, groups * entries]; 0 if singular."""
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
        RIDGE * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    )
    lower, failed = torch.linalg.cholesky_ex(normal)
    lower = torch.where(failed[:, None, None] > 0, torch.eye(lower.shape[1]).to(lower), lower)
    steps = torch.cholesky_solve(right.reshape(rows, -1, 1), lower)[:, :, 0]
    return torch.where(failed[:, None] > 0, 0, steps)
