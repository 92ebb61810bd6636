"""Cyclic coordinate descent on the codes of fixed tables, all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .hessian import PreparedHessian
from .nearest import middles_of, nearest
from .quadratic import look_up, quadratic_loss, slopes_and_losses

#: Columns that are worked off one by one before the others hear of it in one product.
_BLOCK = 128


def descend(
    weights: Tensor, table: Tensor, codes: Tensor, hessian: PreparedHessian, sweeps: int
) -> Tensor:
    """Codes, uint8 [rows, n], of no greater loss: at most `sweeps` passes over the columns.

    weights: float32 [rows, n]; table: float32 [rows, groups, entries], ascending; codes: uint8
    [rows, n], where to start.
    """
    dense = look_up(table, codes)
    slopes, losses = slopes_and_losses(weights, dense, hessian.full)
    new = codes.clone()
    middles = middles_of(table)
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
        chosen = nearest(old - slope / diagonal[k], middles[:, group])
        step = table[:, group].gather(1, chosen[:, None])[:, 0] - old
        lower = step * (2 * slope + step * diagonal[k]) < 0
        step = torch.where(lower, step, 0)
        codes[:, column] = torch.where(lower, chosen.to(torch.uint8), codes[:, column])
        steps[:, k] = step
        near.addcmul_(step[:, None], hessian[column, None, first:last])
        dense[:, column] = table[:, group].gather(1, codes[:, column, None].long())[:, 0]
    return steps
