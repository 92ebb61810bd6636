"""Find the nearest entries of ascending tables, using the middles between entries."""

from __future__ import annotations

import torch
from torch import Tensor


def middles_of(table: Tensor) -> Tensor:
    """Return the middles between neighbouring entries, float32 [rows, groups, entries - 1]."""
    wide = table.double()
    return ((wide[:, :, :-1] + wide[:, :, 1:]) * 0.5).float()


def nearest(values: Tensor, middles: Tensor) -> Tensor:
    """Return the codes of the entries nearest to values [rows], int64 [rows]; of two, the lower."""
    return (values[:, None] > middles).sum(1)


def assign(weights: Tensor, table: Tensor) -> Tensor:
    """Return the codes of the nearest entries, uint8 [rows, n]."""
    grouped = weights.reshape(*table.shape[:2], -1)
    codes = torch.zeros_like(grouped, dtype=torch.uint8)
    for middle in middles_of(table).unbind(2):
        codes += grouped > middle[:, :, None]
    return codes.reshape(weights.shape)
