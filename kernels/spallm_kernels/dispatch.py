"""Which implementation serves a call: the backend by device, the path by shape and dtype.

Two paths lead to a product. *decode* looks weights up on their way into the multiplication and
reads only packed codes: best for few tokens. *dense* writes the weight once, multiplies by the
library's matrix product, and throws it away.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from typing import Protocol, cast

import torch
from torch import Tensor

_MODULES = {
    "cpu": "spallm_kernels.cpu.linear",
    "reference": "spallm_kernels.reference.linear",
    "triton": "spallm_kernels.triton.linear",
}
PATHS = ("decode", "dense")
#: What can go through the columns of a layer in calibration.
_COLUMN_BACKENDS = ("torch", "triton")

#: Widest codes that the Triton kernels take.
_TRITON_BITS = 4
_TRITON_CAPABILITY = (8, 0)


class Backend(Protocol):
    """What a backend provides; `reference/linear.py` documents `dequantize` and `table_grad`."""

    def dequantize(
        self,
        index_map: Tensor,
        table: Tensor,
        in_features: int,
        *,
        hash_seed: int | None = None,
        first_row: int = 0,
    ) -> Tensor: ...

    def table_grad(
        self,
        weight_grad: Tensor,
        index_map: Tensor,
        table: Tensor,
        *,
        hash_seed: int | None = None,
        first_row: int = 0,
    ) -> Tensor: ...


class Decoder(Backend, Protocol):
    """A backend with a path of its own for few tokens."""

    def can_decode(self, x: Tensor, table: Tensor) -> bool: ...

    def decode_tokens(self, *, hashed: bool) -> int: ...

    def decode(
        self,
        x: Tensor,
        index_map: Tensor,
        table: Tensor,
        bias: Tensor | None = None,
        *,
        hash_seed: int | None = None,
    ) -> Tensor: ...


def choose_backend(device: torch.device, bits: int = 4, backend: str | None = None) -> str:
    """Name of the backend for tensors on `device`: `backend` where given, else the fastest.

    Where a CUDA device cannot run the Triton kernels, it gets the reference and a warning says why,
    once. Raises ValueError for a backend that does not exist or does not take such tensors.
    """
    if backend is None:
        if device.type == "cpu":
            return "cpu"
        obstacle = _why_not_triton(device, bits)
        if obstacle is None:
            return "triton"
        _warn_once(f"sketched layers run on slow reference code: {obstacle}")
        return "reference"
    if backend not in _MODULES:
        raise ValueError(f"backend must be one of {sorted(_MODULES)}, found {backend!r}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' needs tensors on the CPU, found them on {device}")
    if backend == "triton" and (obstacle := _why_not_triton(device, bits)) is not None:
        raise ValueError(f"backend 'triton' cannot serve this call: {obstacle}")
    return backend


def choose_column_backend(device: torch.device, entries: int, backend: str | None = None) -> str:
    """Returns `triton` or `torch`, which go through the columns of a layer in calibration.

    entries: entries of a table; backend: the one to use, by default Triton on a GPU that can run
    it. Tensors on the CPU are for Triton's interpreter, on request. Raises ValueError if there is
    no such backend or if it cannot take the tensors.
    """
    bits = (entries - 1).bit_length()
    if backend is None:
        gpu = device.type == "cuda" and _why_not_triton(device, bits) is None
        return "triton" if gpu else "torch"
    if backend not in _COLUMN_BACKENDS:
        raise ValueError(f"backend must be one of {list(_COLUMN_BACKENDS)}, found {backend!r}")
    return choose_backend(device, bits, backend) if backend == "triton" else backend


def choose_path(
    backend: str, x: Tensor, table: Tensor, *, hashed: bool = False, path: str | None = None
) -> str:
    """`decode` or `dense` for x [tokens, in_features]: `path` where given, else the faster one."""
    if path is not None and path not in PATHS:
        raise ValueError(f"path must be one of {sorted(PATHS)}, found {path!r}")
    decodes = backend != "reference" and load_decoder(backend).can_decode(x, table)
    if path == "decode" and not decodes:
        raise ValueError(
            f"backend {backend!r} cannot decode {x.dtype} inputs {list(x.shape)} with tables "
            f"{list(table.shape)}"
        )
    if path is not None:
        return path
    few = decodes and 0 < x.shape[0] <= load_decoder(backend).decode_tokens(hashed=hashed)
    return "decode" if few else "dense"


@functools.cache
def load_backend(name: str) -> Backend:
    """The module of a backend."""
    return cast(Backend, importlib.import_module(_MODULES[name]))


@functools.cache
def load_decoder(name: str) -> Decoder:
    """The module of a backend that has the decode path."""
    return cast(Decoder, importlib.import_module(_MODULES[name]))


@functools.cache
def _why_not_triton(device: torch.device, bits: int) -> str | None:
    """What keeps the Triton kernels from serving a device, None when nothing does."""
    if bits > _TRITON_BITS:
        return f"the Triton kernels take up to {_TRITON_BITS} bits, found {bits}"
    if device.type != "cpu" and (obstacle := _why_not_gpu(device)) is not None:
        return obstacle
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'spallm-convert[gpu]'"
    if device.type == "cpu" and not load_backend("triton").INTERPRETED:  # type: ignore[attr-defined]
        return "tensors are on the CPU"
    return None


def _why_not_gpu(device: torch.device) -> str | None:
    """Returns what a device lacks to run Triton kernels, None if it lacks nothing."""
    if device.type != "cuda" or torch.version.hip is not None:
        kind = "an AMD GPU" if torch.version.hip is not None else f"{device.type!r}"
        return f"the Triton kernels need an NVIDIA GPU, found {kind}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _TRITON_CAPABILITY:
        least, found = (".".join(map(str, pair)) for pair in (_TRITON_CAPABILITY, capability))
        return f"the Triton kernels need compute capability {least}, found {found}"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
