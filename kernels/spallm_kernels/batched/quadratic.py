"""Compute the quadratic losses of sketched rows, and their slopes, with products in float64."""

from __future__ import annotations

import torch
from torch import Tensor

#: The most numbers in one temporary of a block of rows.
SCRATCH = 1 << 26


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """Return the sketched weights [rows, n], in the dtype of the table.

    Args:
        table: float [rows, groups, entries].
        codes: uint8 [rows, n], below entries.
    """
    grouped = codes.reshape(*table.shape[:2], -1).long()
    return table.gather(2, grouped).reshape(codes.shape)


def quadratic_loss(weights: Tensor, dense: Tensor, hessian: Tensor) -> Tensor:
    """Return the loss (dense - weights) H (dense - weights)^T of every row.

    Args:
        weights: float32 [rows, n].
        dense: Sketched weights, float32 [rows, n].
        hessian: H, float64 [n, n], symmetric.

    Returns:
        float64 [rows].
    """
    return slopes_and_losses(weights, dense, hessian)[1]


def slopes_and_losses(weights: Tensor, dense: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the slopes and losses of sketched rows in float64, some rows at a time.

    Args:
        weights: float32 [rows, n].
        dense: Sketched weights, float32 [rows, n].
        hessian: H, float64 [n, n], symmetric.

    Returns:
        Slopes (dense - weights) H, float32 [rows, n], and losses, float64 [rows].
    """
    slopes = torch.empty_like(weights)
    losses = torch.empty(len(weights), dtype=torch.float64, device=weights.device)
    together = max(1, SCRATCH // weights.shape[1])
    for first in range(0, len(weights), together):
        some = slice(first, first + together)
        moved = dense[some].double() - weights[some]
        product = moved @ hessian
        slopes[some] = product
        losses[some] = product.mul_(moved).sum(1)
    return slopes, losses
