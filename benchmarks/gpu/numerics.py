"""Measure how far results on the device are from float64, and whether they repeat bit for bit.

The comparison is fast, because the device also computes the float64 reference, with the reference
backend. Memory that outputs may get is first filled with NaN, so that values that a kernel does not
write cannot be right by chance.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from spallm_kernels import lut_linear
from spallm_kernels.reference.linear import dequantize, table_grad

from .operands import BITS, LLAMA, Layer, Sketch, Task, random_gradient, random_input, random_sketch
from .timing import Bench

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
#: Bits, layer, tokens: every tile of the decode path at 4 bits, and the dense path.
CASES = (
    *((BITS, LLAMA[0], tokens) for tokens in (1, 5, 16, 32, 64, 256)),
    *((bits, LLAMA[0], tokens) for bits in (3, 2) for tokens in (1, 16, 256)),
    (BITS, LLAMA[2], 1),
)


def numerics(bench: Bench) -> list[Task]:
    return [
        Task(
            f"{name}, {bits} bits, {layer.name}, {tokens} tokens",
            partial(measure_error, bench, name, bits, layer, tokens),
        )
        for bits, layer, tokens in CASES
        for name in DTYPES
    ]


def measure_error(bench: Bench, dtype: str, bits: int, layer: Layer, tokens: int) -> dict[str, Any]:
    """Measure relative errors of product and gradients, and whether two runs are equal."""
    kind = DTYPES[dtype]
    x = random_input(bench, layer, tokens, dtype=kind)
    y_grad = random_gradient(bench, layer, tokens, dtype=kind)
    sketch = random_sketch(bench, layer, bits=bits, dtype=kind)
    first, second = (_run(x, sketch, y_grad) for _ in range(2))
    expected = _expected(x.double(), sketch, y_grad.double())
    return {
        "dtype": dtype,
        "bits": bits,
        "layer": layer.name,
        "tokens": tokens,
        "relative_error": {name: _relative_error(first[name], expected[name]) for name in expected},
        "repeats": all(torch.equal(first[name], second[name]) for name in first),
    }


def _run(x: Tensor, sketch: Sketch, y_grad: Tensor) -> dict[str, Tensor]:
    x, table = (leaf.clone().requires_grad_() for leaf in (x, sketch.table))
    poison = [torch.full_like(tensor, torch.nan) for tensor in (y_grad, x, table)]
    del poison  # torch's allocator gives the same memory to the next tensors of these sizes
    y = lut_linear(x, sketch.index_map, table)
    x_grad, table_gradient = torch.autograd.grad(y, (x, table), y_grad)
    return {"y": y.detach(), "x_grad": x_grad, "table_grad": table_gradient}


def _expected(x: Tensor, sketch: Sketch, y_grad: Tensor) -> dict[str, Tensor]:
    table = sketch.table.double()
    weight = dequantize(sketch.index_map, table, x.shape[1])
    return {
        "y": x @ weight.T,
        "x_grad": y_grad @ weight,
        "table_grad": table_grad(y_grad.T @ x, sketch.index_map, table),
    }


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of the reference; NaN if a value is NaN."""
    return ((found.double() - expected).norm() / expected.norm()).item()
