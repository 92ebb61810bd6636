"""Measure one product of all experts of a mixture against a loop over them, and against dense ones.

The experts are the first projections of Qwen3-30B-A3B (gate and up in one): 128 of 2048 -> 1536, of
which each token has 8, drawn at random.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spallm_formats import row_bytes
from spallm_kernels import lut_experts, lut_linear

from .operands import BITS, GROUPS, Sketch, Task, ratio
from .timing import Bench, Call

EXPERTS, CHOSEN = 128, 8
OUT_FEATURES, IN_FEATURES = 1536, 2048
TOKENS = (1, 16, 256, 2048)
_LOOPED, _GROUPED = "a loop of lut_linear", "dense, grouped"
#: More tokens per expert than a call takes without waiting for the device.
_MOST_IN_A_GRAPH = 1024


def experts(bench: Bench) -> list[Task]:
    return [Task(f"{tokens} tokens", partial(measure_experts, bench, tokens)) for tokens in TOKENS]


@torch.no_grad()
def measure_experts(bench: Bench, tokens: int) -> dict[str, Any]:
    """Measure one product of all experts, a loop over those with tokens, and dense experts."""
    rows, columns, tokens = bench.size(OUT_FEATURES), bench.size(IN_FEATURES), bench.tokens(tokens)
    number = max(CHOSEN, EXPERTS // bench.scale)
    scores = torch.rand(tokens, number, device=bench.device)
    chosen = scores.topk(CHOSEN).indices.flatten().sort().values
    offsets = torch.searchsorted(chosen, torch.arange(number + 1, device=bench.device))
    x = bench.randn(tokens * CHOSEN, columns)
    packed = row_bytes(columns, BITS)
    codes = torch.randint(0, 256, (number, rows, packed), device=bench.device, dtype=torch.uint8)
    sketch = Sketch(codes, bench.randn(number, rows, GROUPS, 1 << BITS))
    calls: dict[str, list[Call]] = {
        "ours": [partial(lut_experts, x, offsets, *sketch)],
        _LOOPED: [partial(_loop, x, offsets.tolist(), sketch)],
    }
    if bench.has_gpu:
        weight = bench.randn(number, rows, columns).transpose(1, 2)
        ends = offsets[1:].int()
        calls[_GROUPED] = [partial(torch._grouped_mm, x, weight, ends)]
    in_a_graph = tokens <= _MOST_IN_A_GRAPH
    us = bench.compare(calls, graph=in_a_graph)
    return {
        "experts": number,
        "experts_per_token": CHOSEN,
        "tokens": tokens,
        "in_a_graph": in_a_graph,
        "us": us,
        "speedup": {name: ratio(us, "ours", name) for name in calls if name != "ours"},
    }


def _loop(x: Tensor, offsets: list[int], sketch: Sketch) -> list[Tensor]:
    """Multiply the tokens of one expert after another."""
    return [
        lut_linear(x[start:end], sketch.index_map[expert], sketch.table[expert])
        for expert, (start, end) in enumerate(itertools.pairwise(offsets))
        if end > start
    ]
