"""Measure tokens of several tenants, whose sets of tables share the codes of one layer.

All tokens have the tables of the base, or half of them do and the others have 8 sets, or each has a
set of its own. `lut_linear` is the product with the base alone, for as many tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from spallm_kernels import lut_linear, lut_linear_sets

from .operands import LLAMA, Layer, Task, random_input, random_sketches, ratio
from .timing import Bench, Call

SLOTS = 64
TOKENS = (1, 16, 64, 256, 2048)
#: More tokens than a call takes without waiting for the device cannot be in a CUDA graph.
_MOST_IN_A_GRAPH = 512


def tenants(bench: Bench) -> list[Task]:
    return [
        Task(f"{layer.name}, {tokens} tokens", partial(measure_tenants, bench, layer, tokens))
        for tokens in TOKENS
        for layer in LLAMA
    ]


@torch.no_grad()
def measure_tenants(bench: Bench, layer: Layer, tokens: int) -> dict[str, Any]:
    """Measure tokens of the base and of several sets against a product with the base."""
    x = random_input(bench, layer, tokens)
    sketches = random_sketches(bench, layer)
    slots = max(1, SLOTS // bench.scale)
    tables = bench.randn(slots, *sketches[0].table.shape)
    number = torch.arange(x.shape[0], device=bench.device)
    sets = {
        "the base": torch.full_like(number, -1),
        "8 sets and the base": torch.where(number % 2 == 0, -1, number // 2 % min(8, slots)),
        "each its own": number % slots,
    }
    contestants: dict[str, list[Call]] = {
        "lut_linear": [partial(lut_linear, x, *sketch) for sketch in sketches]
    }
    for name, chosen in sets.items():
        contestants[name] = [
            partial(lut_linear_sets, x, *sketch, tables, chosen) for sketch in sketches
        ]
    in_a_graph = tokens <= _MOST_IN_A_GRAPH
    us = bench.compare(contestants, graph=in_a_graph)
    return {
        "layer": layer.name,
        "tokens": tokens,
        "slots": slots,
        "in_a_graph": in_a_graph,
        "us": us,
        "times_lut_linear": {name: ratio(us, "lut_linear", name) for name in sets},
    }
