"""Improve the codes of fixed tables by cyclic coordinate descent, all rows at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spallm_kernels.dispatch import choose_column_backend

from .hessian import PreparedHessian
from .nearest import middles_of, nearest
from .quadratic import look_up, quadratic_loss, slopes_and_losses

#: Columns that are processed one by one before one product updates the columns after them.
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
    """Improve codes by coordinate descent; a code changes only if that lowers the loss.

    Args:
        weights: float32 [rows, n].
        table: float32 [rows, groups, entries], ascending.
        codes: Codes to start from, uint8 [rows, n].
        hessian: Damped and factored Hessian of n columns, from `prepare_hessian`.
        sweeps: The most passes over all columns.
        block: Columns that are processed one by one before one product updates the columns after
            them.
        backend: `triton` launches one kernel per block, `torch` about seven per column; by default
            Triton on GPUs that can run it.

    Returns:
        Codes, uint8 [rows, n]. No row has a greater loss than before.

    Raises:
        ValueError: If the backend does not exist or does not support the tensors.
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
    """Change codes and dense in a block; return how far weights moved, float32 [rows, block]."""
    width = codes.shape[1] // table.shape[1]
    near, steps = slopes[:, first:last].clone(), torch.empty_like(slopes[:, first:last])
    # Must stay a tensor: to divide by a number, torch on a GPU multiplies by its rounded inverse.
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
