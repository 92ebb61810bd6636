"""Choose the implementation of a call: the backend by device, the path by shape and dtype.

A product can be computed on two paths. *decode* looks weights up on their way into the
multiplication and reads only packed codes: it is best for few tokens. *dense* writes the weight
once, multiplies by the library's matrix product, and discards the weight.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from typing import Protocol, cast

import torch
from torch import Tensor

from .fallback import check_device, first_passing

_MODULES = {
    "cpu": "spallm_kernels.cpu.linear",
    "portable": "spallm_kernels.triton.portable",
    "reference": "spallm_kernels.reference.linear",
    "triton": "spallm_kernels.triton.linear",
}
_EXPERTS = {
    "cpu": "spallm_kernels.cpu.experts",
    "portable": "spallm_kernels.triton.portable_experts",
    "reference": "spallm_kernels.reference.experts",
    "triton": "spallm_kernels.triton.experts",
}
PATHS = ("decode", "dense")
#: Backends that can process the columns of a layer in calibration.
_COLUMN_BACKENDS = ("torch", "triton")

#: The fastest first. `portable` has no assembly.
_GPU_BACKENDS = ("triton", "portable")
#: The widest codes, in bits, and the oldest compute capability that the Triton kernels support.
_TRITON_BITS = 4
_TRITON_CAPABILITY = (8, 0)


class Backend(Protocol):
    """Describe a backend module. `reference/linear.py` documents `dequantize` and `table_grad`."""

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
    """Describe a backend module with a separate path for few tokens."""

    def can_decode(self, x: Tensor, table: Tensor) -> bool: ...

    def decode_tokens(self, x: Tensor, table: Tensor, *, hashed: bool) -> float: ...

    def decode(
        self,
        x: Tensor,
        index_map: Tensor,
        table: Tensor,
        bias: Tensor | None = None,
        *,
        hash_seed: int | None = None,
    ) -> Tensor: ...


class Differentiator(Backend, Protocol):
    """Describe a backend module that differentiates a product without anything dense."""

    def can_differentiate(
        self, y_grad: Tensor, table: Tensor, in_features: int, hash_seed: int | None
    ) -> bool: ...

    def input_grad(
        self, y_grad: Tensor, index_map: Tensor, table: Tensor, in_features: int
    ) -> Tensor: ...

    def product_table_grad(
        self, y_grad: Tensor, x: Tensor, index_map: Tensor, table: Tensor
    ) -> Tensor: ...


class ExpertsDecoder(Protocol):
    """Describe a module that multiplies tokens with their experts, all experts in one call."""

    def can_decode(self, x: Tensor, table: Tensor, *, hashed: bool) -> bool: ...

    def decode(
        self,
        x: Tensor,
        offsets: Tensor,
        index_map: Tensor,
        table: Tensor,
        *,
        hash_seed: int | None = None,
    ) -> Tensor: ...


def choose_backend(device: torch.device, bits: int = 4, backend: str | None = None) -> str:
    """Return the name of the backend for tensors on a device.

    On a GPU, `triton` is used, then `portable`, if their kernels pass a check on the device (see
    `fallback.py`), else the reference. The first time, a RuntimeWarning gives the reason. A backend
    that is asked for is not checked.

    Args:
        device: Device of the tensors.
        bits: Bits of a code.
        backend: `cpu`, `portable`, `reference` or `triton`; by default the fastest one for the
            device.

    Returns:
        The name of the backend.

    Raises:
        ValueError: If the backend does not exist or does not support such tensors.
    """
    if backend is None:
        if device.type == "cpu":
            return "cpu"
        obstacle = why_reference(device, bits)
        if obstacle is None:
            return first_passing(device, bits, gpu_backends(), load_decoder)
        _warn_once(f"sketched layers run on slow reference code: {obstacle}")
        return "reference"
    if backend not in _MODULES:
        raise ValueError(f"backend must be one of {sorted(_MODULES)}, found {backend!r}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' needs tensors on the CPU, found tensors on {device}")
    if backend in _GPU_BACKENDS:
        obstacle = _why_not_triton(device, bits, backend)
        if obstacle is not None:
            raise ValueError(f"backend {backend!r} cannot serve this call: {obstacle}")
    return backend


def gpu_backends() -> tuple[str, ...]:
    """Return the backends that this build of torch can run on a GPU, the fastest first."""
    return _GPU_BACKENDS if torch.version.hip is None else ("portable",)


def why_reference(device: torch.device, bits: int) -> str | None:
    """Return why a GPU gets the reference without any check; None if it can run Triton kernels."""
    return _why_not_triton(device, bits, "portable")


def check_gpu(device: torch.device, bits: int) -> dict[str, str | None]:
    """Check the kernels of a GPU again (see `fallback.check_device`)."""
    return check_device(device, bits, gpu_backends(), load_decoder)


def choose_column_backend(device: torch.device, entries: int, backend: str | None = None) -> str:
    """Return the backend that processes the columns of a layer in calibration.

    Args:
        device: Device of the tensors.
        entries: Entries of a table.
        backend: `torch` or `triton`; by default Triton on a GPU where the backend `triton` passes
            its check, else torch. On the CPU, `triton` needs Triton's interpreter.

    Returns:
        `torch` or `triton`.

    Raises:
        ValueError: If the backend does not exist or does not support such tensors.
    """
    bits = (entries - 1).bit_length()
    if backend is None:
        gpu = device.type == "cuda" and _why_not_triton(device, bits, "triton") is None
        passes = gpu and first_passing(device, bits, gpu_backends(), load_decoder) == "triton"
        return "triton" if passes else "torch"
    if backend not in _COLUMN_BACKENDS:
        raise ValueError(f"backend must be one of {list(_COLUMN_BACKENDS)}, found {backend!r}")
    return choose_backend(device, bits, backend) if backend == "triton" else backend


def choose_path(
    backend: str, x: Tensor, table: Tensor, *, hashed: bool = False, path: str | None = None
) -> str:
    """Return the path of a product.

    Args:
        backend: Name of the backend.
        x: Inputs, float [tokens, in_features].
        table: Tables, float [out_features, groups, 2^bits].
        hashed: Whether codes are computed, not stored.
        path: `decode` or `dense`; by default the faster one.

    Returns:
        `decode` or `dense`.

    Raises:
        ValueError: If the path does not exist or the backend cannot decode such tensors.
    """
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
    if not decodes:
        return "dense"
    most = load_decoder(backend).decode_tokens(x, table, hashed=hashed)
    return "decode" if 0 < x.shape[0] <= most else "dense"


def choose_differentiator(
    backend: str, y_grad: Tensor, table: Tensor, in_features: int, hash_seed: int | None
) -> Differentiator | None:
    """Return the backend if it can differentiate a product without anything dense, else None.

    Args:
        backend: Name of the backend.
        y_grad: Gradient of the products, float [tokens, out_features].
        table: Tables, float [out_features, groups, 2^bits].
        in_features: Columns of the weight.
        hash_seed: Seed of the `hash` mapping; None if codes are stored.
    """
    if backend != "cpu":
        return None
    module = cast(Differentiator, load_backend(backend))
    able = module.can_differentiate(y_grad, table, in_features, hash_seed)
    return module if able else None


@functools.cache
def load_backend(name: str) -> Backend:
    """Return the module of a backend, which is imported on the first call.

    Args:
        name: `cpu`, `portable`, `reference` or `triton`.

    Returns:
        The module.
    """
    return cast(Backend, importlib.import_module(_MODULES[name]))


@functools.cache
def load_decoder(name: str) -> Decoder:
    """Return the module of a backend that has the decode path, which is imported on the first call.

    Args:
        name: `cpu`, `portable` or `triton`.

    Returns:
        The module.
    """
    return cast(Decoder, importlib.import_module(_MODULES[name]))


@functools.cache
def load_experts(name: str) -> ExpertsDecoder:
    """Return the module of a backend for experts, which is imported on the first call.

    Args:
        name: `cpu`, `portable`, `reference` or `triton`.

    Returns:
        The module.
    """
    return cast(ExpertsDecoder, importlib.import_module(_EXPERTS[name]))


@functools.cache
def _why_not_triton(device: torch.device, bits: int, backend: str) -> str | None:
    """Return why `triton` or `portable` cannot be used on a device, or None if it can."""
    if bits > _TRITON_BITS:
        return f"the Triton kernels support up to {_TRITON_BITS} bits, found {bits}"
    if device.type != "cpu" and (obstacle := _why_not_gpu(device, backend)) is not None:
        return obstacle
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'spallm-convert[gpu]'"
    if device.type == "cpu" and not load_backend("triton").INTERPRETED:  # type: ignore[attr-defined]
        return "tensors are on the CPU"
    return None


def _why_not_gpu(device: torch.device, backend: str) -> str | None:
    """Return what a device lacks to run the Triton kernels, or None if it lacks nothing."""
    if device.type != "cuda":  # torch for ROCm calls its devices so, too
        return f"the Triton kernels need an NVIDIA or AMD GPU, found {device.type!r}"
    if torch.version.hip is not None:
        found = "the assembly needs an NVIDIA GPU, found an AMD GPU; use backend 'portable'"
        return None if backend in gpu_backends() else found
    capability = torch.cuda.get_device_capability(device)
    if capability < _TRITON_CAPABILITY:
        least, found = (".".join(map(str, pair)) for pair in (_TRITON_CAPABILITY, capability))
        return f"the Triton kernels need compute capability {least}, found {found}"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
