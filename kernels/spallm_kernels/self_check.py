"""Compare the GPU kernels of a backend with the reference, on the device, on two small layers.

Tests without a GPU cannot tell whether a compiler makes the right code for a device. So the device
itself is asked, once. The first layer has the shape of real ones, so the kernels that are compiled
for it are used again. The second is hashed, with ragged rows and steps, and a bias.

What is expected is computed on the CPU in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .reference import linear as reference

#: Relative error (Frobenius norm) that rounding results explains. Sums of table gradients are kept
#: in float32, and looking up is exact.
_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}
#: The longest error that a message repeats, in characters.
_ERROR_LENGTH = 300


class Kernels(Protocol):
    """Describe the part of a backend that is checked (see `dispatch.py`)."""

    @property
    def can_decode(self) -> Callable[..., bool]: ...

    @property
    def decode(self) -> Callable[..., Tensor]: ...

    @property
    def dequantize(self) -> Callable[..., Tensor]: ...

    @property
    def table_grad(self) -> Callable[..., Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Say which kernel is wrong and how, in one line, and whether it raised an exception."""

    text: str
    raised: bool


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Describe a random layer, and the numbers of tokens that it is multiplied with."""

    rows: int
    columns: int
    groups: int
    dtype: torch.dtype
    tokens: tuple[int, ...]
    hash_seed: int | None = None
    has_bias: bool = False


#: The first is multiplied on the tensor cores in two ways: for one token, and for many.
LAYERS = (
    Layer(rows=48, columns=2048, groups=4, dtype=torch.bfloat16, tokens=(1, 17)),
    Layer(
        rows=19,
        columns=480,
        groups=5,
        dtype=torch.float16,
        tokens=(1,),
        hash_seed=2**32 - 5,
        has_bias=True,
    ),
)


def find_fault(
    kernels: Kernels, device: torch.device, bits: int, layers: Iterable[Layer] = LAYERS
) -> Fault | None:
    """Run the kernels of a backend on random layers and compare the results with the reference.

    Args:
        kernels: The backend's module.
        device: Device to run them on.
        bits: Bits of a code.
        layers: Layers to compare on.

    Returns:
        The first kernel that differs or raises an exception; None if all are right.

    Raises:
        torch.OutOfMemoryError: If the device has no memory left, which says nothing of a kernel.
    """
    for layer in layers:
        for name, run in _steps(kernels, device, bits, layer):
            raised = False
            try:
                found = run()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                found, raised = describe(error), True
            if found is not None:
                hashed = "hashed, " if layer.hash_seed is not None else ""
                text = f"{name}, {bits} bits, {hashed}{str(layer.dtype)[6:]}: {found}"
                return Fault(text=text, raised=raised)
    return None


def describe(error: Exception) -> str:
    """Return an exception's type and message in one printable line of bounded length."""
    words = "".join(c if c.isprintable() else " " for c in str(error)).split()
    text = f"{type(error).__name__}: {' '.join(words)}"
    return text if len(text) <= _ERROR_LENGTH else text[:_ERROR_LENGTH] + "..."


def _steps(
    kernels: Kernels, device: torch.device, bits: int, layer: Layer
) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Yield the name of each call and a function that makes it and returns what is wrong."""
    generator = torch.Generator(device="cpu").manual_seed(bits)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return drawn.to(layer.dtype)

    table = draw(layer.rows, layer.groups, 1 << bits)
    weight_grad, bias = draw(layer.rows, layer.columns), draw(layer.rows)
    index_map = _random_map(layer, bits, generator)
    here = [tensor.to(device) for tensor in (index_map, table)]
    weight = reference.dequantize(
        index_map, table.double(), layer.columns, hash_seed=layer.hash_seed
    )

    def dequantize() -> str | None:
        found = kernels.dequantize(*here, layer.columns, hash_seed=layer.hash_seed)
        exact = torch.equal(found.cpu().double(), weight)
        return None if exact else "the weights are not the entries of the tables"

    def table_grad() -> str | None:
        found = kernels.table_grad(weight_grad.to(device), *here, hash_seed=layer.hash_seed)
        expected = reference.table_grad(
            weight_grad.double(), index_map, table, hash_seed=layer.hash_seed
        )
        return _difference(found, expected)

    def decode(x: Tensor) -> Callable[[], str | None]:
        def run() -> str | None:
            added = bias.to(device) if layer.has_bias else None
            found = kernels.decode(x.to(device), *here, added, hash_seed=layer.hash_seed)
            expected = x.double() @ weight.T
            return _difference(found, expected + bias.double() if layer.has_bias else expected)

        return run

    yield "dequantize", dequantize
    for tokens in layer.tokens:
        x = draw(tokens, layer.columns)
        if kernels.can_decode(x, table):
            yield f"decode of {tokens} token{'s' * (tokens > 1)}", decode(x)
    yield "table_grad", table_grad


def _random_map(layer: Layer, bits: int, generator: torch.Generator) -> Tensor:
    """Return random packed codes in the row length of stored maps: whole 16 bytes."""
    row_bytes = 0 if layer.hash_seed is not None else -(-layer.columns * bits // 128) * 16
    shape = (layer.rows, row_bytes)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device="cpu")


def _difference(found: Tensor, expected: Tensor) -> str | None:
    """Return how far a result is from the expected one, or None if rounding explains it."""
    tolerance = _TOLERANCE[found.dtype]
    error = float((found.cpu().double() - expected).norm() / expected.norm())
    if error <= tolerance:  # false for NaN
        return None
    return f"relative error {error:.3g}, at most {tolerance:.0e} is accepted"
