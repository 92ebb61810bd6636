"""How a model calls a block: noted once, and repeated with other hidden states."""

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
    """Arguments of a block but for the hidden states: these come first, or as a keyword."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_first: bool

    @classmethod
    def taken_apart(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Tensor]:
        """What a block was called with, as a call and hidden states."""
        if args:
            return cls(args[1:], kwargs, True), args[0]
        rest = dict(kwargs)
        if _HIDDEN not in rest:
            names = ", ".join(rest)
            raise CalibrationError(f"blocks are called without hidden states, with {names}")
        hidden = rest.pop(_HIDDEN)
        return cls((), rest, False), hidden

    def repeat(self, block: nn.Module, hidden: Tensor) -> Any:
        """What a block returns for other hidden states.

        It gets containers of its own: what a block leaves in one for those behind it, as keys and
        values that they share, is of other hidden states when these are run.
        """
        args, kwargs = map(_fresh, self.args), {k: _fresh(v) for k, v in self.kwargs.items()}
        if self.hidden_first:
            return block(hidden, *args, **kwargs)
        return block(**kwargs, **{_HIDDEN: hidden})

    def same_as(self, other: Call) -> bool:
        """Whether the arguments are the same, tensors by their values."""
        return _same((self.args, self.kwargs), (other.args, other.kwargs))


def _fresh(value: Any) -> Any:
    """A copy of a container that could be written to; anything else as it is."""
    return copy.copy(value) if isinstance(value, MutableMapping | list) else value


def _same(found: Any, expected: Any) -> bool:
    """Whether two values are the same, tensors and what objects hold included."""
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
    return np.array_equal(found, expected)  # which compares what is no array as it is
