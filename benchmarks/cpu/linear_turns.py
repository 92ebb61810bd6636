"""Time the sketched layer on one vector unit, in a process of its own.

`benchmarks.cpu.linear` starts it, because a process chooses its unit once:

    SPALLM_CPU=UNIT python -m benchmarks.cpu.linear_turns JOB.json RESULT.json

Every call works on another copy of its weights or codes. All copies together are several times as
large as the caches, so nothing stays there between calls, as in a model of many layers.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numba
import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.shared.machine import write_results
from spallm_formats import row_bytes
from spallm_kernels import lut_linear
from spallm_kernels.cpu.linear import dequantize
from spallm_kernels.cpu.vector_units import PORTABLE, host_unit
from spallm_kernels.dispatch import PATHS

from .turns import Contestants, Row, milliseconds

#: Bytes of all copies of an operand.
COPIES = 1 << 27
DTYPES = (torch.float32, torch.bfloat16)
SEED = 0  # of hashed codes

Call = Callable[[int], object]


def main() -> None:
    job_path, result = map(Path, sys.argv[1:])
    write_results(result, measure(**json.loads(job_path.read_text())))


class Operands:
    """Hold copies of dense weights and of sketches with bfloat16 tables, made when needed."""

    def __init__(self, features: int, groups: int) -> None:
        self.features, self.groups = features, groups
        self._sketches: dict[int, list[tuple[Tensor, Tensor]]] = {}

    @cached_property
    def dense(self) -> dict[torch.dtype, list[Tensor]]:
        """Dense weights by dtype."""
        shape, found = (self.features, self.features), {}
        for dtype in DTYPES:
            count = _copies(self.features**2 * dtype.itemsize)
            found[dtype] = [torch.randn(shape).to(dtype) for _ in range(count)]
        return found

    def sketch(self, bits: int, turn: int) -> tuple[Tensor, Tensor]:
        """Return the index map and the tables for a turn."""
        if bits not in self._sketches:
            codes = (self.features, row_bytes(self.features, bits))
            self._sketches[bits] = [
                (
                    torch.randint(0, 256, codes, dtype=torch.uint8),
                    torch.randn(self.features, self.groups, 1 << bits).bfloat16(),
                )
                for _ in range(_copies(math.prod(codes)))
            ]
        copies = self._sketches[bits]
        return copies[turn % len(copies)]

    def product(self, dtype: torch.dtype, tokens: int) -> Call:
        """Return the dense layer."""
        x, weights = self.inputs(dtype, tokens), self.dense[dtype]
        return lambda turn: linear(x, weights[turn % len(weights)])

    def sketched(
        self,
        dtype: torch.dtype,
        tokens: int,
        bits: int = 4,
        *,
        hash_seed: int | None = None,
        path: str | None = None,
    ) -> Call:
        """Return the sketched layer."""
        x = self.inputs(dtype, tokens)
        return lambda turn: lut_linear(x, *self.sketch(bits, turn), hash_seed=hash_seed, path=path)

    def inputs(self, dtype: torch.dtype, tokens: int) -> Tensor:
        return torch.randn(tokens, self.features).to(dtype)


def measure(
    features: int,
    groups: int,
    turns: int,
    tokens: list[int],
    widths: list[int],
    many: list[int],
    around: list[int],
) -> Row:
    """Return the figures of the unit that this process uses.

    tokens: numbers of tokens for products. widths: bits for one token. many: numbers of tokens for
    gradients. around: numbers of tokens for both paths.
    """
    torch.manual_seed(0)
    operands = Operands(features, groups)
    unit = host_unit()
    found = {"unit": PORTABLE if unit is None else unit.name}
    print(f"unit {found['unit']}", flush=True)
    with torch.no_grad():
        rows = [
            _said(about | milliseconds(contestants, turns))
            for about, contestants in _cases(operands, tokens, widths, many, around)
        ]
    threads = {"torch": torch.get_num_threads(), "numba": numba.get_num_threads()}
    return found | {"threads": threads, "rows": rows}


def _cases(
    operands: Operands, tokens: list[int], widths: list[int], many: list[int], around: list[int]
) -> Iterator[tuple[Row, Contestants]]:
    """Yield groups of contestants, with what they have in common."""
    for count in tokens:
        yield {"section": "products", "tokens": count}, _products(operands, count)
    yield (
        {"section": "widths", "tokens": 1},
        {
            f"{bits} bits, {_name(dtype)}": operands.sketched(dtype, 1, bits)
            for dtype in DTYPES
            for bits in widths
        },
    )
    yield (
        {"section": "dequantize"},
        {f"to {_name(dtype)}": _dequantize(operands, dtype) for dtype in DTYPES},
    )
    for dtype in DTYPES:
        for count in many:
            about = {"section": "gradients", "inputs": _name(dtype), "tokens": count}
            yield about, _gradients(operands, dtype, count)
    for dtype in DTYPES:
        for seed in (None, SEED):
            for count in around:
                yield (
                    {
                        "section": "paths",
                        "inputs": _name(dtype),
                        "hashed": seed is not None,
                        "tokens": count,
                    },
                    {
                        path: operands.sketched(dtype, count, hash_seed=seed, path=path)
                        for path in PATHS
                    },
                )


def _products(operands: Operands, tokens: int) -> Contestants:
    calls: dict[str, Call] = {}
    for dtype in DTYPES:
        calls[f"dense {_name(dtype)}"] = operands.product(dtype, tokens)
        calls[f"sketch {_name(dtype)}"] = operands.sketched(dtype, tokens)
    return calls


def _dequantize(operands: Operands, dtype: torch.dtype) -> Call:
    def call(turn: int) -> Tensor:
        index_map, table = operands.sketch(4, turn)
        return dequantize(index_map, table.to(dtype), operands.features)

    return call


def _gradients(operands: Operands, dtype: torch.dtype, tokens: int) -> Contestants:
    """Return the gradients of inputs and of weights or tables, given the gradient of outputs."""
    x, y_grad = (operands.inputs(dtype, tokens) for _ in range(2))
    weights, features, of = operands.dense[dtype], operands.features, torch.ops.spallm
    chosen = (None, None)  # codes are stored; the backend is the default one
    return {
        "dense, inputs": lambda turn: y_grad @ weights[turn % len(weights)],
        "sketch, inputs": lambda turn: of.input_grad(
            y_grad, *operands.sketch(4, turn), features, *chosen
        ),
        "dense, weight": lambda _: y_grad.T @ x,
        "sketch, tables": lambda turn: of.table_grad(y_grad, x, *operands.sketch(4, turn), *chosen),
    }


def _copies(nbytes: int) -> int:
    return max(2, COPIES // nbytes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _said(row: Row) -> Row:
    about = [f"{value}" for name, value in row.items() if name in ("section", "inputs", "hashed")]
    times = (f"{name} {level['p50']:.2f}" for name, level in row["milliseconds"].items())
    tokens = f"{row['tokens']} tokens" if "tokens" in row else ""
    print(f"  {' '.join(about)} {tokens}: {', '.join(times)} ms", flush=True)
    return row


if __name__ == "__main__":
    main()
