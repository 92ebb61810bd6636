"""Record how a model calls a block, and repeat the call with other hidden states."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spallm_convert.errors import CalibrationError

_HIDDEN = "hidden_states"


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a block, without the hidden states.

    Attributes:
        args: Positional arguments after the hidden states.
        kwargs: Keyword arguments, without the hidden states.
        hidden_first: Whether the hidden states are the first positional argument. If not, they are
            passed by keyword.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_first: bool

    @classmethod
    def taken_apart(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Tensor]:
        """Split the arguments of a block into the call and the hidden states.

        Raises:
            CalibrationError: There are no positional arguments and no `hidden_states`.
        """
        if args:
            return cls(args[1:], kwargs, True), args[0]
        rest = dict(kwargs)
        if _HIDDEN not in rest:
            names = ", ".join(rest)
            raise CalibrationError(
                f"blocks are called with the arguments {names}, expected {_HIDDEN} among them"
            )
        hidden = rest.pop(_HIDDEN)
        return cls((), rest, False), hidden

    def repeat(self, block: nn.Module, hidden: Tensor) -> Any:
        """Call a block with other hidden states and return its output.

        Copy dicts and lists first. Some blocks store values in them for later blocks (shared keys
        and values), and those values would be stale in the next call.
        """
        args, kwargs = map(_fresh, self.args), {k: _fresh(v) for k, v in self.kwargs.items()}
        if self.hidden_first:
            return block(hidden, *args, **kwargs)
        return block(**kwargs, **{_HIDDEN: hidden})

    def on(self, device: torch.device, moved: dict[int, Tensor]) -> Call:
        """Return the call with its tensors on a device.

        Args:
            device: The device.
            moved: Tensors that were moved already, by id of the original. New ones are added, so
                that calls share tensors as before.
        """
        args = tuple(_moved(value, device, moved) for value in self.args)
        kwargs = {name: _moved(value, device, moved) for name, value in self.kwargs.items()}
        return Call(args, kwargs, self.hidden_first)

    def same_as(self, other: Call) -> bool:
        """Return whether the arguments are equal. Tensors are compared by value."""
        return _same((self.args, self.kwargs), (other.args, other.kwargs))


def _moved(value: Any, device: torch.device, moved: dict[int, Tensor]) -> Any:
    """Move tensors, also those in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        if id(value) not in moved:
            moved[id(value)] = value.to(device)
        return moved[id(value)]
    if type(value) in (tuple, list):
        return type(value)(_moved(part, device, moved) for part in value)
    if type(value) is dict:
        return {name: _moved(part, device, moved) for name, part in value.items()}
    return value


def _fresh(value: Any) -> Any:
    """Copy a dict or list, which a block could write to; return anything else as it is."""
    return copy.copy(value) if isinstance(value, MutableMapping | list) else value


def _same(found: Any, expected: Any) -> bool:
    """Return whether two values are equal, comparing tensors and attributes of objects too."""
    if found is expected:
        return True
    if type(found) is not type(expected):
        return False
    if isinstance(found, Tensor):
        return torch.equal(found, expected)
    if isinstance(found, tuple | list):
        return len(found) == len(expected) and all(map(_same, found, expected))
    if isinstance(found, dict):
        return found.keys() == expected.keys() and all(_same(found[k], expected[k]) for k in found)
    if hasattr(found, "__dict__"):
        return _same(vars(found), vars(expected))
    return np.array_equal(found, expected)  # compares values that are not arrays, too
