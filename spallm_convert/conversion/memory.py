"""Refuse to run blocks that do not fit into memory, before the system ends the process."""

from __future__ import annotations

import re
from collections import Counter

import torch

from spallm_convert.devices import free_memory
from spallm_convert.errors import SpallmError
from spallm_convert.sketch.plan import Plan

_BLOCK = re.compile(r"^(.*?\.\d+)\.")
_FLOAT32 = 4


def block_bytes(plan: Plan) -> int:
    """Return the bytes of the linear weights of a plan's largest block in float32."""
    sizes: Counter[str] = Counter()
    for layer in plan.layers.values():
        block = _BLOCK.match(layer.path + ".")
        sizes[block[1] if block else layer.path] += _FLOAT32 * layer.module.weights
    return max(sizes.values(), default=0)


def other_bytes(plan: Plan) -> int:
    """Return the bytes of the largest weight that is not sketched, in float32."""
    return _FLOAT32 * max((tensor.elements for tensor in plan.kept.values()), default=0)


def check_memory(plan: Plan, device: torch.device) -> None:
    """Check that the largest block and the largest other weight fit into memory in float32.

    Args:
        plan: The layers to sketch.
        device: Where the blocks are run.

    Raises:
        SpallmError: If they do not.
    """
    needed = block_bytes(plan) + other_bytes(plan)
    free = free_memory(device)
    if free is not None and free < needed:
        raise SpallmError(
            f"running the model block by block needs {needed / 1e9:.1f} GB of memory, found "
            f"{free / 1e9:.1f} GB free on {device}"
        )
