"""Measure tokens of several tenants, whose sets of tables share the codes of one layer.

All tokens have the tables of the base, or one other set; half have the base and the others 8 sets;
or each has a set of its own. `lut_linear` is the product with the base alone, for as many tokens.
Each copy of a layer has tables of its own for all sets, so that no cache holds them.

Affine sets are measured with as many tokens as there are sets.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from spallm_kernels import lut_linear, lut_linear_affine, lut_linear_sets

from .operands import GROUPS, LLAMA, Layer, Task, random_input, random_sketches, ratio
from .timing import Bench, Call

SLOTS = 64
TOKENS = (1, 16, 64, 256, 2048)
ONE, OWN, READ = "one set", "each its own", "reading the tables"
#: More tokens than a call takes without waiting for the device cannot be in a CUDA graph.
_MOST_IN_A_GRAPH = 512


def tenants(bench: Bench) -> list[Task]:
    return [
        Task(f"{layer.name}, {tokens} tokens", partial(measure_tenants, bench, layer, tokens))
        for tokens in TOKENS
        for layer in LLAMA
    ]


def affine(bench: Bench) -> list[Task]:
    return [
        Task(f"{layer.name}, {groups} groups", partial(measure_affine, bench, layer, groups))
        for groups in (1, GROUPS)
        for layer in LLAMA
    ]


@torch.no_grad()
def measure_tenants(bench: Bench, layer: Layer, tokens: int) -> dict[str, Any]:
    """Measure tokens of the base and of several sets against a product with the base."""
    x = random_input(bench, layer, tokens)
    sketches = random_sketches(bench, layer)
    slots = min(SLOTS, bench.tokens(tokens))
    tables = [bench.randn(slots, *sketch.table.shape) for sketch in sketches]
    number = torch.arange(x.shape[0], device=bench.device)
    sets = {
        "the base": torch.full_like(number, -1),
        ONE: torch.zeros_like(number),
        "8 sets and the base": torch.where(number % 2 == 0, -1, number // 2 % min(8, slots)),
        OWN: number % slots,
    }
    contestants: dict[str, list[Call]] = {
        "lut_linear": [partial(lut_linear, x, *sketch) for sketch in sketches]
    }
    for name, chosen in sets.items():
        contestants[name] = [
            partial(lut_linear_sets, x, *sketch, own, chosen)
            for sketch, own in zip(sketches, tables, strict=True)
        ]
    contestants[READ] = [own.sum for own in tables]
    in_a_graph = tokens <= _MOST_IN_A_GRAPH
    us = bench.compare(contestants, graph=in_a_graph)
    return {
        "layer": layer.name,
        "tokens": tokens,
        "slots": slots,
        "in_a_graph": in_a_graph,
        "us": us,
        "times_lut_linear": {name: ratio(us, "lut_linear", name) for name in sets},
        "times_one_set": max(0.0, us[OWN]["p50"] - us[READ]["p50"]) / us[ONE]["p50"],
    }


@torch.no_grad()
def measure_affine(bench: Bench, layer: Layer, groups: int) -> dict[str, Any]:
    """Measure a token of each affine set against as many tokens of the base."""
    slots = bench.tokens(SLOTS)
    x = random_input(bench, layer, slots)
    sketches = random_sketches(bench, layer, groups=groups)
    numbers = slots, *sketches[0].table.shape[:2]
    shift = 0.01 * bench.randn(*numbers)
    scale = 1 + 0.01 * bench.randn(*numbers)
    sets = torch.randperm(slots, device=bench.device)
    us = bench.compare(
        {
            "lut_linear": [partial(lut_linear, x, *sketch) for sketch in sketches],
            "affine": [
                partial(lut_linear_affine, x, *sketch, shift, scale, sets) for sketch in sketches
            ],
        }
    )
    return {
        "layer": layer.name,
        "groups_per_row": groups,
        "tokens": slots,
        "slots": slots,
        "us": us,
        "times_lut_linear": ratio(us, "lut_linear", "affine"),
    }
