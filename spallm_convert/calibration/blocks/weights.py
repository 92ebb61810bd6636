"""Read weights of a checkpoint into modules that were built without weights, and free them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spallm_convert.errors import CalibrationError
from spallm_convert.source.quantized.weights import DequantizedTensor
from spallm_convert.source.stored_names import LoadedNames, Piece
from spallm_formats import ITEM_BYTES, StoredTensor, read_bytes

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Weights:
    """The tensors of a checkpoint, to be read into the modules of a model.

    Args:
        tensors: The tensors, by their names in the checkpoint.
        names: What the tensors become in the model.
        dtype: The dtype that they are converted to.
        device: The device that they are read to.
        tied: For parameters that are not stored, the parameter with the same value, by name.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        names: LoadedNames,
        dtype: torch.dtype,
        device: torch.device,
        tied: Mapping[str, str] | None = None,
    ) -> None:
        self._tensors, self._names = tensors, names
        self._dtype, self._device = dtype, device
        self._tied = tied or {}

    def missing(self, module: nn.Module, path: str) -> list[str]:
        """Return the parameters of a module for which the checkpoint has no fitting tensor.

        A tensor fits if it has the parameter's shape and a floating-point dtype that can be read.
        """
        named = ((f"{path}.{name}", value) for name, value in module.named_parameters())
        return [name for name, value in named if not self._pieces(name, value)]

    def check(self, block: nn.Module, path: str) -> None:
        """Raise CalibrationError if the checkpoint lacks a weight of a block."""
        if missing := self.missing(block, path):
            raise CalibrationError(
                f"{path}: the checkpoint has no tensor for {', '.join(missing[:3])}, so the "
                f"block cannot be run"
            )

    def fill(self, module: nn.Module, path: str) -> None:
        """Read all weights of a module and the modules in it; leave missing ones as they are."""
        for below, inner in module.named_modules():
            self.fill_own(inner, f"{path}.{below}" if below else path)

    def fill_own(self, module: nn.Module, path: str) -> None:
        """Read a module's own weights, without the modules in it."""
        for name, value in [*module.named_parameters(recurse=False), *_saved_buffers(module)]:
            full = f"{path}.{name}" if path else name
            if pieces := self._pieces(full, value):
                read = torch.cat([self._read(piece) for piece in pieces])
                stored = self._tensors[pieces[0].tensor].shape
                is_turned = full in self._names.turned
                if is_turned or (full in self._names.transposed and stored != tuple(value.shape)):
                    read = read.view(stored).transpose(-1, -2).contiguous()
                read = read.view(value.shape).to(self._device, self._dtype)
                setattr(module, name, _parameter(read) if name in module._parameters else read)

    def _pieces(self, name: str, value: Tensor) -> tuple[Piece, ...]:
        """Return the rows that a parameter or buffer of the model consists of, if all fit it."""
        known = self._names.pieces
        pieces = known.get(name) or known.get(self._tied.get(name, "")) or ()
        if name in self._names.turned:
            pieces = (self._names.turned[name],)
        tensors = [self._tensors[piece.tensor] for piece in pieces]
        shape = tuple(value.shape)
        if not pieces or any(tensor.dtype not in _DTYPES for tensor in tensors):
            return ()
        found = tensors[0].shape
        if len(pieces) == 1 and pieces[0].rows * _columns(tensors[0]) == tensors[0].elements:
            fits = found == shape and name not in self._names.turned
            turned = name in self._names.transposed and (*found[:-2], *found[:-3:-1]) == shape
            return pieces if fits or turned else ()
        alike = {(len(tensor.shape) > 1, _columns(tensor)) for tensor in tensors}
        is_matrix = alike == {(True, shape[-1])}
        is_vector = len(shape) == 1 and all(len(tensor.shape) == 1 for tensor in tensors)
        zipped = zip(pieces, tensors, strict=True)
        count = sum(piece.rows * _columns(tensor) for piece, tensor in zipped)
        return pieces if (is_matrix or is_vector) and count == value.numel() else ()

    def _read(self, piece: Piece) -> Tensor:
        """Return the values of a piece, in one dimension, as they are stored."""
        tensor = self._tensors[piece.tensor]
        if isinstance(tensor, DequantizedTensor):  # not rounded to its dtype
            rows = tensor.read_rows(piece.first, piece.first + piece.rows)
            return torch.from_numpy(rows).flatten()
        size = _columns(tensor) * ITEM_BYTES[tensor.dtype]
        raw = read_bytes(tensor, piece.first * size, (piece.first + piece.rows) * size)
        dtype = _DTYPES[tensor.dtype]
        # frombuffer raises an error for zero bytes.
        return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)


def _columns(tensor: StoredTensor) -> int:
    return tensor.shape[-1] if len(tensor.shape) > 1 else 1


def forget(module: nn.Module) -> None:
    """Free a module's own parameters.

    Buffers stay: they are small, and some are not in the checkpoint.
    """
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, _parameter(parameter.to("meta")))


def make_computed(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Compute a weight that is not stored, such as sinusoidal positions of Marian.

    Args:
        module: A module. It is left as it is if it does not compute a weight.
        dtype: The dtype of the weight.
        device: Its device.
    """
    weight = module._parameters.get("weight")
    create: Any = getattr(module, "create_weight", None)
    if weight is not None and weight.is_meta and create is not None:
        module.weight = _parameter(create().to(device, dtype))


def _saved_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the buffers that a checkpoint stores. Some of them are trained."""
    hidden = module._non_persistent_buffers_set
    return [(n, b) for n, b in module.named_buffers(recurse=False) if n not in hidden]


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
