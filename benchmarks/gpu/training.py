"""Compare the backward pass with the dense layer's, and measure the memory of a training step."""

from __future__ import annotations

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
    random_gradient,
    random_input,
    random_sketch,
    random_weight,
    ratio,
)
from .timing import Bench

TOKENS = 4096


def backward(bench: Bench) -> list[Task]:
    return [Task(layer.name, partial(measure_backward, bench, layer)) for layer in LLAMA]


def memory(bench: Bench) -> list[Task]:
    return [Task(layer.name, partial(measure_memory, bench, layer)) for layer in LLAMA]


def measure_backward(bench: Bench, layer: Layer) -> dict[str, Any]:
    """Measure the gradients of input and table against the dense gradients of input and weight.

    The eager figure is what a training step runs: autograd, launches included. The graph holds the
    same products without them: what the device needs.
    """
    copies = bench.copies(random_weight(bench, layer).nbytes)
    y_grad = random_gradient(bench, layer, TOKENS)
    x = random_input(bench, layer, TOKENS).requires_grad_()
    sketches = [random_sketch(bench, layer) for _ in range(copies)]
    weights = [random_weight(bench, layer).requires_grad_() for _ in range(copies)]
    for sketch in sketches:
        sketch.table.requires_grad_()
    eager = bench.compare(
        {
            "ours": [_backward_of(lut_linear(x, *s), (x, s.table), y_grad) for s in sketches],
            "dense": [_backward_of(linear(x, w), (x, w), y_grad) for w in weights],
        },
        graph=False,
    )
    with torch.no_grad():
        replayed = bench.compare(
            {
                "ours": [partial(_sketched_gradients, x, *s, y_grad) for s in sketches],
                "dense": [partial(_dense_gradients, x, w, y_grad) for w in weights],
            }
        )
    return {
        "layer": layer.name,
        "tokens": TOKENS,
        "us": eager,
        "time_over_dense": ratio(eager, "dense", "ours"),
        "us_graph": replayed,
        "time_over_dense_graph": ratio(replayed, "dense", "ours"),
    }


def _backward_of(y: Tensor, leaves: tuple[Tensor, ...], y_grad: Tensor) -> Callable[[], object]:
    return partial(torch.autograd.grad, y, leaves, y_grad, retain_graph=True)


def _sketched_gradients(x: Tensor, index_map: Tensor, table: Tensor, y_grad: Tensor) -> None:
    operators = torch.ops.spallm
    operators.input_grad(y_grad, index_map, table, x.shape[1], None, None)
    operators.table_grad(y_grad, x, index_map, table, None, None).to(table.dtype)


def _dense_gradients(x: Tensor, weight: Tensor, y_grad: Tensor) -> None:
    _ = y_grad @ weight, y_grad.T @ x


def measure_memory(bench: Bench, layer: Layer) -> dict[str, Any]:
    """Measure bytes beyond inputs and outputs, gradients included: peak, and between passes."""
    x = random_input(bench, layer, TOKENS).requires_grad_()
    y_grad = random_gradient(bench, layer, TOKENS)
    index_map, table = random_sketch(bench, layer)
    weight = random_weight(bench, layer).requires_grad_()
    table.requires_grad_()
    ours = _training_memory(bench, partial(lut_linear, x, index_map, table), (x, table), y_grad)
    dense = _training_memory(bench, partial(linear, x, weight), (x, weight), y_grad)
    times_weight = {
        name: None if nbytes is None else nbytes / weight.nbytes for name, nbytes in ours.items()
    }
    return {
        "layer": layer.name,
        "tokens": TOKENS,
        "dense_weight_bytes": weight.nbytes,
        "ours_bytes": ours,
        "ours_times_dense_weight": times_weight,
        "dense_bytes": dense,
    }


def _training_memory(
    bench: Bench, product: Callable[[], Tensor], leaves: tuple[Tensor, ...], y_grad: Tensor
) -> dict[str, int | None]:
    """Measure a second pass: the first compiles kernels and makes the libraries' workspaces."""
    found: dict[str, int | None] = {}
    for _ in range(2):
        for leaf in leaves:
            leaf.grad = None
        bench.collect()
        meter = bench.extra_memory()
        y = product()
        found["between_passes"] = meter.now(y)
        y.backward(y_grad)
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        found["peak"] = meter.peak(y, *gradients)
        del y, gradients
    return found
