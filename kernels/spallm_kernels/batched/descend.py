"""Cyclic coordinate descent on the codes of fixed tables, all rows at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spallm_kernels.dispatch import choose_column_backend

from .hessian import PreparedHessian
from .nearest import middles_of, nearest
from .quadratic import look_up, quadratic_loss, slopes_and_losses

#: Columns that are worked off one by one before the others hear of it in one product.
BLOCK = 128


def descend(
    weights: Tensor,
    table: Tensor,
    codes: Tensor,
    hessian: PreparedHessian,
    sweeps: int,
    *,
    block: int = BLOCK,
    backend: str | None = None,
) -> Tensor:
    """Returns codes, uint8 [rows, n], of no greater loss, after at most `sweeps` passes.

    weights: float32 [rows, n]; table: float32 [rows, groups, entries], ascending; codes: uint8
    [rows, n], where to start; block, backend: as in `compensate`.
    """
    weights, table, single = weights.contiguous(), table.contiguous(), hessian.single.contiguous()
    move: Callable[..., Tensor] = _descend_block
    if choose_column_backend(weights.device, table.shape[2], backend) == "triton":
        from spallm_kernels.triton.descend import descend_block as move
    dense = look_up(table, codes)
    slopes, losses = slopes_and_losses(weights, dense, hessian.full)
    new = codes.clone(memory_format=torch.contiguous_format)
    middles = middles_of(table)
    for _ in range(sweeps):
        changed = torch.zeros((), dtype=torch.bool, device=codes.device)
        for first in range(0, weights.shape[1], block):
            last = min(first + block, weights.shape[1])
            steps = move(table, middles, new, dense, slopes, single, first, last)
            slopes += steps @ single[first:last]
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
    last: int,
) -> Tensor:
    """Changes codes and dense in a block; returns how far weights moved, float32 [rows, block]."""
    width = codes.shape[1] // table.shape[1]
    near, steps = slopes[:, first:last].clone(), torch.empty_like(slopes[:, first:last])
    # Stays a tensor: torch divides by a number on a GPU as a product with its rounded inverse.
    diagonal = hessian.diagonal()
    for k, column in enumerate(range(first, last)):
        group, old, slope = column // width, dense[:, column], near[:, k]
        chosen = nearest(old - slope / diagonal[column], middles[:, group])
        step = table[:, group].gather(1, chosen[:, None])[:, 0] - old
        lower = step * (2 * slope + step * diagonal[column]) < 0
        step = torch.where(lower, step, 0)
        codes[:, column] = torch.where(lower, chosen.to(torch.uint8), codes[:, column])
        steps[:, k] = step
        near.addcmul_(step[:, None], hessian[column, None, first:last])
        dense[:, column] = table[:, group].gather(1, codes[:, column, None].long())[:, 0]
    return steps
