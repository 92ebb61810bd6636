"""Pretend to have a device: its tensors are computed on the CPU, but mix with no others.

A tensor on the device holds one on the CPU. Code that forgets to move a tensor there or back gets
the error that a GPU would give, from an operation on tensors of both kinds or from `.numpy()`. The
type of the device is one that torch knows by name but never checks for.

    with PretendDevice():
        torch.ones(2, device=DEVICE) + torch.ones(2)     raises RuntimeError
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy", 0)
#: They may take tensors of two devices: they carry from one to the other.
_CARRYING = ("_to_copy", "copy_")


class _Elsewhere(torch.Tensor):
    """Wrap a CPU tensor as a tensor on the device."""

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
    """Provide the device, and count its operations in `ran`."""

    def __init__(self):
        super().__init__()
        self.ran = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = _run(function, args, kwargs or {})
        self.ran += any(isinstance(value, _Elsewhere) for value in _tensors(found))
        return found


def _run(function, args, kwargs):
    tensors = [*_tensors(args), *_tensors([*kwargs.values()])]
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
    kwargs = {name: _changed(value, _held) for name, value in kwargs.items()}
    found = function(*_changed(args, _held), **kwargs)
    if name == "copy_":
        return args[0]
    # What is changed in place is the tensor that came, not another one that holds the same.
    known = {id(t.held): t for t in there}

    def outside(tensor):
        if id(tensor) in known:
            return known[id(tensor)]
        return _Elsewhere(tensor) if stays else tensor

    return _changed(found, outside)


def _held(tensor):
    return tensor.held if isinstance(tensor, _Elsewhere) else tensor


# torch's own pytree would take more of the time than all else.


def _tensors(value):
    """Yield the tensors in arguments or results of an operation, lists and tuples included."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _changed(value, change):
    """Return the same structure with every tensor replaced by `change`."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_changed(part, change) for part in value])
    return value
