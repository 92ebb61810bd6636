"""Choose codes column by column, each compensating earlier errors, for all rows at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spallm_kernels.dispatch import choose_column_backend

from .hessian import PreparedHessian
from .nearest import middles_of, nearest

#: Columns that are processed one by one before one product updates the columns after them.
BLOCK = 128


def compensate(
    weights: Tensor,
    table: Tensor,
    hessian: PreparedHessian,
    *,
    block: int = BLOCK,
    backend: str | None = None,
) -> Tensor:
    """Choose codes greedily, in the order of the Hessian's columns.

    Args:
        weights: float32 [rows, n].
        table: float32 [rows, groups, entries], ascending.
        hessian: Damped and factored Hessian of n columns, from `prepare_hessian`.
        block: Columns that are processed one by one before one product updates the columns after
            them.
        backend: `triton` launches one kernel per block, `torch` about seven per column; by default
            Triton on GPUs that can run it.

    Returns:
        Codes, uint8 [rows, n].

    Raises:
        ValueError: If the backend does not exist or does not support the tensors.
    """
    weights, table = weights.contiguous(), table.contiguous()
    middles = middles_of(table)
    choose: Callable[..., Tensor] = _compensate_block
    if choose_column_backend(weights.device, table.shape[2], backend) == "triton":
        from spallm_kernels.triton.compensate import compensate_block as choose

        order = hessian.order
    else:
        order = hessian.order.cpu()
    codes = torch.empty_like(weights, dtype=torch.uint8)
    shift = torch.zeros_like(weights)
    for first in range(0, weights.shape[1], block):
        last = min(first + block, weights.shape[1])
        moved = choose(weights, table, middles, order, hessian.factor, shift, codes, first, last)
        shift[:, last:] += moved @ hessian.factor[first:last, last:]
    return codes


def _compensate_block(
    weights: Tensor,
    table: Tensor,
    middles: Tensor,
    order: Tensor,
    factor: Tensor,
    shift: Tensor,
    codes: Tensor,
    first: int,
    last: int,
) -> Tensor:
    """Write the codes of a block, whose order is on the CPU; return how far its weights moved."""
    width = weights.shape[1] // table.shape[1]
    near = shift[:, first:last].clone()
    moved = torch.empty_like(near)
    columns: list[int] = order[first:last].tolist()
    for k, column in enumerate(columns):
        group, weight = column // width, weights[:, column]
        chosen = nearest(weight - near[:, k], middles[:, group])
        codes[:, column] = chosen
        moved[:, k] = table[:, group].gather(1, chosen[:, None])[:, 0] - weight
        near[:, k + 1 :].addcmul_(moved[:, k, None], factor[first + k, None, first + k + 1 : last])
    return moved
