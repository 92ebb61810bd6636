"""Quadratic losses of sketched rows, and their slopes, multiplied in float64."""

from __future__ import annotations

import torch
from torch import Tensor

#: Floats that temporaries of a block of rows may take.
SCRATCH = 1 << 26


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """Sketched weights [rows, n]: table [rows, groups, entries], codes uint8 [rows, n]."""
    grouped = codes.reshape(*table.shape[:2], -1).long()
    return table.gather(2, grouped).reshape(codes.shape)


def quadratic_loss(weights: Tensor, dense: Tensor, hessian: Tensor) -> Tensor:
    """(dense - weights) H (dense - weights)^T of every row: float64 [rows]. H is float64."""
    return slopes_and_losses(weights, dense, hessian)[1]


def slopes_and_losses(weights: Tensor, dense: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [rows, n] and float64 [rows], multiplied in float64, some rows at a time."""
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
