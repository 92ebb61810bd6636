"""The device that kernels are launched on."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device the current one, which launches go to whatever device their tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()
