"""Define the layers that the GPU suite measures, and make copies of random operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spallm_formats import row_bytes

from .timing import Bench

BITS, GROUPS = 4, 4
HASH_SEED = 7


class Layer(NamedTuple):
    """Describe a linear layer. Its name stays when a smoke run makes it smaller."""

    out_features: int
    in_features: int

    @property
    def name(self) -> str:
        return f"{self.out_features}x{self.in_features}"


class Sketch(NamedTuple):
    """Hold operands of `lut_linear`."""

    index_map: Tensor
    table: Tensor

    @property
    def nbytes(self) -> int:
        return self.index_map.nbytes + self.table.nbytes


class Task(NamedTuple):
    """Hold one measurement, which gives one row of results."""

    name: str
    run: Callable[[], dict[str, Any]]


class UnavailableError(Exception):
    """Report why a section cannot be measured here."""


#: Layers of Llama-3-8B: attention's query and output, the gate, down.
LLAMA = (Layer(4096, 4096), Layer(14336, 4096), Layer(4096, 14336))
#: The down projection of Llama-3-70B.
LARGE = Layer(8192, 28672)
#: All linear layers of a block of Llama-3-8B: q, k, v, o, gate, up, down.
BLOCK = (
    Layer(4096, 4096),
    Layer(1024, 4096),
    Layer(1024, 4096),
    Layer(4096, 4096),
    Layer(14336, 4096),
    Layer(14336, 4096),
    Layer(4096, 14336),
)


def random_sketch(
    bench: Bench,
    layer: Layer,
    *,
    bits: int = BITS,
    groups: int = GROUPS,
    dtype: torch.dtype = torch.bfloat16,
    hashed: bool = False,
) -> Sketch:
    """Return codes and tables of one layer; no codes if they are hashed."""
    rows, columns = bench.size(layer.out_features), bench.size(layer.in_features)
    packed = 0 if hashed else row_bytes(columns, bits)
    codes = torch.randint(0, 256, (rows, packed), device=bench.device, dtype=torch.uint8)
    return Sketch(codes, bench.randn(rows, groups, 1 << bits, dtype=dtype))


def random_sketches(bench: Bench, layer: Layer, **options: Any) -> list[Sketch]:
    """Return enough sketches that no cache holds them all."""
    first = random_sketch(bench, layer, **options)
    copies = bench.copies(first.nbytes)
    return [first, *(random_sketch(bench, layer, **options) for _ in range(copies - 1))]


def random_weight(bench: Bench, layer: Layer) -> Tensor:
    return bench.randn(bench.size(layer.out_features), bench.size(layer.in_features))


def random_weights(bench: Bench, layer: Layer) -> list[Tensor]:
    first = random_weight(bench, layer)
    copies = bench.copies(first.nbytes)
    return [first, *(random_weight(bench, layer) for _ in range(copies - 1))]


def random_input(bench: Bench, layer: Layer, tokens: int, **options: Any) -> Tensor:
    return bench.randn(bench.tokens(tokens), bench.size(layer.in_features), **options)


def random_gradient(bench: Bench, layer: Layer, tokens: int, **options: Any) -> Tensor:
    """Return a gradient of the layer's output."""
    return bench.randn(bench.tokens(tokens), bench.size(layer.out_features), **options)


def ratio(us: dict[str, dict[str, float]], ours: str, theirs: str) -> float:
    """Return how many times faster ours is than theirs, by medians."""
    return us[theirs]["p50"] / us[ours]["p50"]
