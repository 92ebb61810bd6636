"""Read weights of a checkpoint into modules that were built without weights, and free them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from spallm_convert.source.quantized.weights import DequantizedTensor
from spallm_formats import StoredTensor, read_bytes

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Weights:
    """The tensors of a checkpoint, to be read into the modules of a model.

    Args:
        tensors: The tensors, by their names in the model.
        dtype: The dtype that they are converted to.
        device: The device that they are read to.
    """

    def __init__(
        self, tensors: dict[str, StoredTensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._tensors, self._dtype, self._device = tensors, dtype, device

    def missing(self, module: nn.Module, path: str) -> list[str]:
        """Return the parameters of a module for which the checkpoint has no fitting tensor.

        A tensor fits if it has the parameter's shape and a floating-point dtype that can be read.
        """
        named = ((f"{path}.{name}", value) for name, value in module.named_parameters())
        return [name for name, value in named if self._stored(name, value) is None]

    def fill(self, module: nn.Module, path: str) -> None:
        """Read all weights of a module and the modules in it; leave missing ones as they are."""
        for below, inner in module.named_modules():
            self.fill_own(inner, f"{path}.{below}" if below else path)

    def fill_own(self, module: nn.Module, path: str) -> None:
        """Read a module's own weights, without the modules in it."""
        for name, value in [*module.named_parameters(recurse=False), *_saved_buffers(module)]:
            tensor = self._stored(f"{path}.{name}" if path else name, value)
            if tensor is not None:
                read = self._read(tensor)
                setattr(module, name, _parameter(read) if name in module._parameters else read)

    def _stored(self, name: str, value: Tensor) -> StoredTensor | None:
        """Return the tensor for a parameter or buffer of the model, None if there is none."""
        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != tuple(value.shape) or tensor.dtype not in _DTYPES:
            return None
        return tensor

    def _read(self, tensor: StoredTensor) -> Tensor:
        if isinstance(tensor, DequantizedTensor):  # not rounded to its dtype
            rows = torch.from_numpy(tensor.read_rows(0, math.prod(tensor.shape[:-1])))
            return rows.view(tensor.shape).to(self._device, self._dtype)
        raw = read_bytes(tensor, 0, tensor.nbytes)
        dtype = _DTYPES[tensor.dtype]
        # frombuffer raises an error for zero bytes.
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return flat.view(tensor.shape).to(self._device, self._dtype)


def forget(module: nn.Module) -> None:
    """Free a module's own parameters.

    Buffers stay: they are small, and some are not in the checkpoint.
    """
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, _parameter(parameter.to("meta")))


def _saved_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the buffers that a checkpoint stores. Some of them are trained."""
    hidden = module._non_persistent_buffers_set
    return [(n, b) for n, b in module.named_buffers(recurse=False) if n not in hidden]


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
