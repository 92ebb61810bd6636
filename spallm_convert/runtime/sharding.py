"""Treat whole and sharded tensors alike, on one process or on several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each process holds a part of a tensor, as with FSDP2."""
    return hasattr(tensor, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """Return the whole tensor without its history, gathered from all processes if it is sharded."""
    detached: Any = value.detach()
    gathered: Tensor = detached.full_tensor() if is_sharded(detached) else detached
    return gathered


def placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Move a tensor to where a parameter is, and shard it in the same way."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        placed: Any = parameter
        return distribute_tensor(tensor, placed.device_mesh, placed.placements)
    return tensor.to(parameter.device)


def is_first_process() -> bool:
    """Return whether this process has rank 0, or is the only one."""
    return not _distributed() or torch.distributed.get_rank() == 0


def on_first_process(action: Callable[[], None], *, together: bool) -> None:
    """Run an action on the first process only.

    Args:
        action: What the first process does.
        together: Whether all processes call this function. They then return, or raise the first
            process's error, when it is done. Otherwise the others return at once.
    """
    error: BaseException | None = None
    if is_first_process():
        try:
            action()
        except BaseException as raised:  # the others wait, so they are told of any error
            error = raised
    if together and _distributed():
        outcome = [error]
        torch.distributed.broadcast_object_list(outcome, src=0)
        error = outcome[0] if error is None else error
    if error is not None:
        raise error


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
