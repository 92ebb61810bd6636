"""Measure forward products against cuBLAS, and the device's two ceilings: copy and matmul."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from spallm_kernels import lut_linear

from .operands import (
    BITS,
    BLOCK,
    HASH_SEED,
    LARGE,
    LLAMA,
    Layer,
    Sketch,
    Task,
    random_input,
    random_sketch,
    random_sketches,
    random_weight,
    random_weights,
    ratio,
)
from .timing import Bench, Call

LAYERS = (*LLAMA, LARGE)
#: The most important first, because time may run out.
TOKENS = (1, 16, 2048, 8192, 4, 64, 32, 8, 2, 128)
#: Tokens at which both paths are timed, to see where they cross; `decode` takes at most 64.
PATH_TOKENS = {"decode": (16, 32, 64), "dense": (16, 32, 64, 128)}

_COPIED_BYTES = 2 << 30
_MATMUL_SIZE = 8192


def ceilings(bench: Bench) -> list[Task]:
    return [Task("copy", partial(measure_copy, bench)), Task("matmul", partial(_matmul, bench))]


def forward(bench: Bench) -> list[Task]:
    return [
        Task(f"{layer.name}, {tokens} tokens", partial(measure_forward, bench, layer, tokens))
        for tokens in TOKENS
        for layer in LAYERS
    ]


def widths(bench: Bench) -> list[Task]:
    return [Task(layer.name, partial(measure_widths, bench, layer)) for layer in LAYERS]


def block(bench: Bench) -> list[Task]:
    return [Task("seven layers, 1 token", partial(measure_block, bench))]


def measure_copy(bench: Bench) -> dict[str, Any]:
    """Measure a copy within the device; bytes count as read and as written."""
    source = bench.randn((_COPIED_BYTES // 2) // bench.scale**2)
    target = torch.empty_like(source)
    us = bench.compare({"copy": [lambda: target.copy_(source)]})
    rate = 2 * source.nbytes / us["copy"]["p50"] / 1e3
    return {"what": "copy", "bytes": source.nbytes, "us": us, "gigabytes_per_second": rate}


def _matmul(bench: Bench) -> dict[str, Any]:
    size = bench.size(_MATMUL_SIZE)
    left, right = bench.randn(size, size), bench.randn(size, size)
    us = bench.compare({"matmul": [lambda: left @ right]})
    rate = 2 * size**3 / us["matmul"]["p50"] / 1e6
    return {"what": "matmul", "size": size, "us": us, "teraflops": rate}


@torch.no_grad()
def measure_forward(bench: Bench, layer: Layer, tokens: int) -> dict[str, Any]:
    """Measure our product as dispatched, and on each path if both compete, against `linear`."""
    x = random_input(bench, layer, tokens)
    sketches, weights = random_sketches(bench, layer), random_weights(bench, layer)
    contestants: dict[str, list[Call]] = {
        "ours": [partial(lut_linear, x, *sketch) for sketch in sketches],
        "cublas": [partial(linear, x, weight) for weight in weights],
    }
    for path, counts in PATH_TOKENS.items():
        if tokens in counts:
            contestants[path] = [partial(lut_linear, x, *s, path=path) for s in sketches]
    us = bench.compare(contestants)
    outside = x.nbytes + x.shape[0] * sketches[0].table.shape[0] * x.element_size()
    moved = {"ours": sketches[0].nbytes + outside, "cublas": weights[0].nbytes + outside}
    return {
        "layer": layer.name,
        "tokens": tokens,
        "us": us,
        "speedup": ratio(us, "ours", "cublas"),
        "bytes": moved,
        "gigabytes_per_second": {name: n / us[name]["p50"] / 1e3 for name, n in moved.items()},
        "teraflops": _teraflops(x, weights[0], us),
    }


def _teraflops(x: Tensor, weight: Tensor, us: dict[str, dict[str, float]]) -> dict[str, float]:
    operations = 2 * x.shape[0] * weight.numel()
    return {name: operations / us[name]["p50"] / 1e6 for name in ("ours", "cublas")}


@torch.no_grad()
def measure_widths(bench: Bench, layer: Layer) -> dict[str, Any]:
    """Measure one token at 4, 3 and 2 bits, and at 4 bits with hashed codes."""
    x = random_input(bench, layer, 1)
    contestants: dict[str, list[Call]] = {
        f"{bits} bits": [
            partial(lut_linear, x, *sketch) for sketch in random_sketches(bench, layer, bits=bits)
        ]
        for bits in (4, 3, 2)
    }
    contestants["4 bits, hash"] = [
        partial(lut_linear, x, *sketch, hash_seed=HASH_SEED)
        for sketch in random_sketches(bench, layer, hashed=True)
    ]
    us = bench.compare(contestants)
    speedup = {name: ratio(us, name, "4 bits") for name in us if name != "4 bits"}
    return {"layer": layer.name, "tokens": 1, "us": us, "speedup_over_4_bits": speedup}


@torch.no_grad()
def measure_block(bench: Bench) -> dict[str, Any]:
    """Measure one token through the seven linear layers of a block, one after another in one graph.

    A contestant's call is a whole block, and its copies are whole blocks too.
    """
    inputs = {n: bench.randn(1, bench.size(n)) for n in {layer.in_features for layer in BLOCK}}
    xs = [inputs[layer.in_features] for layer in BLOCK]
    sketched = [[random_sketch(bench, layer) for layer in BLOCK]]
    dense = [[random_weight(bench, layer) for layer in BLOCK]]
    for _ in range(bench.copies(sum(sketch.nbytes for sketch in sketched[0])) - 1):
        sketched.append([random_sketch(bench, layer) for layer in BLOCK])
    for _ in range(bench.copies(sum(weight.nbytes for weight in dense[0])) - 1):
        dense.append([random_weight(bench, layer) for layer in BLOCK])
    us = bench.compare(
        {
            "ours": [partial(_sketched_block, xs, sketches) for sketches in sketched],
            "cublas": [partial(_dense_block, xs, weights) for weights in dense],
        }
    )
    return {"tokens": 1, "bits": BITS, "us": us, "speedup": ratio(us, "ours", "cublas")}


def _sketched_block(xs: list[Tensor], sketches: list[Sketch]) -> None:
    for x, sketch in zip(xs, sketches, strict=True):
        lut_linear(x, *sketch)


def _dense_block(xs: list[Tensor], weights: list[Tensor]) -> None:
    for x, weight in zip(xs, weights, strict=True):
        linear(x, weight)
