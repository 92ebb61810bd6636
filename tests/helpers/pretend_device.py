"""A device that is not there: its tensors are computed on the CPU, and mix with no others.

Tensors that say they are elsewhere hold one on the CPU. Whoever forgets to carry one there or back
sees what a GPU would give: an error from an operation with tensors of both kinds, or from
`.numpy()`. The kind of device is one that torch knows by name and never asks for.

    with PretendDevice():
        torch.ones(2, device=DEVICE) + torch.ones(2)     raises RuntimeError
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy", 0)
#: They may take tensors of two devices: they carry from one to the other.
_CARRYING = ("_to_copy", "copy_")


class _Elsewhere(torch.Tensor):
    """A tensor on the device."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    def tolist(self):
        return self.held.tolist()  # torch refuses it to all that are not its own

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """Counts in `ran` the operations that the device has done."""

    def __init__(self):
        super().__init__()
        self.ran = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = _run(function, args, kwargs or {})
        self.ran += any(isinstance(value, _Elsewhere) for value in tree_flatten(found)[0])
        return found


def _run(function, args, kwargs):
    values, _ = tree_flatten((args, kwargs))
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    here = [t for t in tensors if not isinstance(t, _Elsewhere) and t.dim() and not t.is_meta]
    there = [t for t in tensors if isinstance(t, _Elsewhere)]
    name = function._schema.name.removeprefix("aten::")
    if here and there and name not in _CARRYING:
        raise RuntimeError(f"{name}: tensors on the CPU and on {DEVICE}")
    target = kwargs.get("device")
    if target is not None and torch.device(target) == DEVICE:
        kwargs, stays = kwargs | {"device": "cpu"}, True
    else:
        stays = bool(there) and target is None
    found = function(*tree_map(_held, args), **tree_map(_held, kwargs))
    if name == "copy_":
        return args[0]
    # What is changed in place is the tensor that came, not another one that holds the same.
    known = {id(t.held): t for t in there}

    def outside(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in known:
            return known[id(value)]
        return _Elsewhere(value) if stays else value

    return tree_map(outside, found)


def _held(value):
    return value.held if isinstance(value, _Elsewhere) else value
