"""The nearest entries of ascending tables, by the middles between them."""

from __future__ import annotations

import torch
from torch import Tensor


def middles_of(table: Tensor) -> Tensor:
    """Middles between neighbouring entries, float32 [rows, groups, entries - 1]."""
    wide = table.double()
    return ((wide[:, :, :-1] + wide[:, :, 1:]) * 0.5).float()


def nearest(values: Tensor, middles: Tensor) -> Tensor:
    """Codes, int64 [rows], of the entries nearest to values [rows], the lower one of two."""
    return (values[:, None] > middles).sum(1)


def assign(weights: Tensor, table: Tensor) -> Tensor:
    """Codes, uint8 [rows, n], of the nearest entries."""
    grouped = weights.reshape(*table.shape[:2], -1)
    codes = torch.zeros_like(grouped, dtype=torch.uint8)
    for middle in middles_of(table).unbind(2):
        codes += grouped > middle[:, :, None]
    return codes.reshape(weights.shape)
