"""Refuse to run blocks that do not fit into memory, before the system ends the process."""

from __future__ import annotations

import re
from collections import Counter

import torch

from spallm_convert.devices import TooLittleMemoryError, device_name, free_memory
from spallm_convert.sketch.plan import Plan

_BLOCK = re.compile(r"^(.*?\.\d+)\.")
_FLOAT32 = 4
_UNITS = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3))


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
        TooLittleMemoryError: If they do not.
    """
    needed = block_bytes(plan) + other_bytes(plan)
    free = free_memory(device)
    if free is not None and free < needed:
        found = f"running the model block by block needs {size_in_words(needed)} of memory"
        raise TooLittleMemoryError(
            f"{found}, found {size_in_words(free)} free on {device}",
            f"{found}, more than was free on {device_name(device)}",
        )


def size_in_words(count: int) -> str:
    """Return a number of bytes in a fitting unit, such as "1.3 GB" (powers of 1000)."""
    unit, size = next(((u, s) for u, s in _UNITS if count >= s), ("bytes", 1))
    return f"{count / size:.{0 if size == 1 else 1}f} {unit}"
