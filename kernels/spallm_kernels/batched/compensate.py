"""Codes chosen column by column, each making up for the error of those before, all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .hessian import PreparedHessian
from .nearest import middles_of, nearest

#: Columns that are worked off one by one before the others hear of it in one product.
_BLOCK = 128


def compensate(weights: Tensor, table: Tensor, hessian: PreparedHessian) -> Tensor:
    """Codes, uint8 [rows, n], chosen greedily in the order of the Hessian's columns.

    weights: float32 [rows, n]; table: float32 [rows, groups, entries], ascending.
    """
    rows, n = weights.shape
    width = n // table.shape[1]
    middles = middles_of(table)
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
            chosen = nearest(weight - near[:, k], middles[:, group])
            codes[:, column] = chosen
            moved[:, k] = table[:, group].gather(1, chosen[:, None])[:, 0] - weight
            near[:, k + 1 :].addcmul_(moved[:, k, None], factor[k, None, k + 1 :])
        shift[:, last:] += moved @ hessian.factor[first:last, last:]
    return codes
