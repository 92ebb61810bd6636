"""Compare other runtimes of compressed layers with ours: SketchTune and bitsandbytes NF4."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from spallm_kernels import lut_linear

from .operands import (
    LLAMA,
    Layer,
    Task,
    UnavailableError,
    random_gradient,
    random_input,
    random_sketch,
    random_sketches,
    random_weights,
    ratio,
)
from .published import STEPS, published_linear
from .timing import Bench, Call

TRAINING_TOKENS = 4096
NF4_TOKENS = (1, 16)
#: Environment variable: the folder of a copy of bitsandbytes that is not installed.
BITSANDBYTES_PATH = "BITSANDBYTES_PATH"

_TRAINING_COPIES = 2
_PUBLISHED_COPIES = 8  # the restatement in torch is slow, and reads much more than any cache


def published(bench: Bench) -> list[Task]:
    return [
        *(Task(f"{layer.name}, 1 token", partial(_one_token, bench, layer)) for layer in LLAMA),
        *(
            Task(f"{layer.name}, {TRAINING_TOKENS} tokens", partial(_training, bench, layer))
            for layer in LLAMA
        ),
    ]


def nf4(bench: Bench) -> list[Task]:
    if path := os.environ.get(BITSANDBYTES_PATH):
        sys.path.append(path)
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UnavailableError(f"bitsandbytes is not installed ({error})") from None
    return [
        Task(f"{layer.name}, {tokens} tokens", partial(_nf4, bench, bitsandbytes, layer, tokens))
        for tokens in NF4_TOKENS
        for layer in LLAMA
    ]


@torch.no_grad()
def _one_token(bench: Bench, layer: Layer) -> dict[str, Any]:
    x = random_input(bench, layer, 1)
    sketches = random_sketches(bench, layer)
    contestants: dict[str, list[Call]] = {"ours": [partial(lut_linear, x, *s) for s in sketches]}
    for name, steps in STEPS.items():
        contestants[name] = [
            partial(published_linear, x, *s, steps) for s in sketches[:_PUBLISHED_COPIES]
        ]
    return _row(layer, 1, bench.compare(contestants))


def _training(bench: Bench, layer: Layer) -> dict[str, Any]:
    """Run forward and backward with autograd, launches included."""
    x = random_input(bench, layer, TRAINING_TOKENS).requires_grad_()
    y_grad = random_gradient(bench, layer, TRAINING_TOKENS)
    sketches = [random_sketch(bench, layer) for _ in range(_TRAINING_COPIES)]
    for sketch in sketches:
        sketch.table.requires_grad_()
    products: dict[str, Callable[..., Tensor]] = {"ours": lut_linear}
    products |= {name: partial(published_linear, steps=steps) for name, steps in STEPS.items()}
    contestants = {
        name: [
            partial(_step, partial(product, x, *sketch), (x, sketch.table), y_grad)
            for sketch in sketches
        ]
        for name, product in products.items()
    }
    return _row(layer, TRAINING_TOKENS, bench.compare(contestants, graph=False))


def _step(product: Callable[[], Tensor], leaves: tuple[Tensor, ...], y_grad: Tensor) -> None:
    torch.autograd.grad(product(), leaves, y_grad)


@torch.no_grad()
def _nf4(bench: Bench, bitsandbytes: Any, layer: Layer, tokens: int) -> dict[str, Any]:
    """Quantize to NF4 as bitsandbytes does by default: blocks of 64 weights, float32 scales."""
    x = random_input(bench, layer, tokens)
    sketches, weights = random_sketches(bench, layer), random_weights(bench, layer)
    quantize = partial(bitsandbytes.functional.quantize_4bit, quant_type="nf4")
    copies = bench.copies(sketches[0].index_map.nbytes)
    packed = [quantize(weights[number % len(weights)]) for number in range(copies)]
    multiply = bitsandbytes.matmul_4bit
    us = bench.compare(
        {
            "ours": [partial(lut_linear, x, *sketch) for sketch in sketches],
            "nf4": [partial(multiply, x, w.t(), quant_state=state) for w, state in packed],
            "cublas": [partial(linear, x, weight) for weight in weights],
        }
    )
    return _row(layer, tokens, us) | {"bitsandbytes": bitsandbytes.__version__}


def _row(layer: Layer, tokens: int, us: dict[str, dict[str, float]]) -> dict[str, Any]:
    speedup = {name: ratio(us, "ours", name) for name in us if name != "ours"}
    return {"layer": layer.name, "tokens": tokens, "us": us, "speedup": speedup}
