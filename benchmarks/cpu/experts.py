"""Compare sketched experts on the CPU with a loop over experts, and with dense ones.

64 experts of 2048 -> 1408, as in DeepSeek-V2-Lite, at 4 bits with 4 groups in
float32. Each token has 8 experts, drawn at random. All calls run in turn, several times.

    python -m benchmarks.cpu.experts [--output FILE]
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.shared.machine import RESULTS, machine, quantiles, versions, write_results
from spallm_formats import row_bytes
from spallm_kernels import lut_experts, lut_linear

EXPERTS, COLUMNS, ROWS, CHOSEN = 64, 2048, 1408, 8
BITS, GROUPS = 4, 4
ROUNDS = 12
TOKENS = (1, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "experts.json")
    output = parser.parse_args().output
    calls = cases()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append(1000 * (time.perf_counter() - start))
    milliseconds = {name: quantiles(times[2:]) for name, times in samples.items()}
    for name, levels in milliseconds.items():
        print(f"{name:40} {levels['p50']:8.2f} ms")
    write_results(
        output,
        {
            "benchmark": "experts",
            "machine": machine(),
            "versions": versions("torch", "numba", "numpy", "spallm-convert"),
            "settings": {
                "experts": EXPERTS,
                "in_features": COLUMNS,
                "out_features": ROWS,
                "experts_per_token": CHOSEN,
                "bits": BITS,
                "groups_per_row": GROUPS,
            },
            "milliseconds": milliseconds,
        },
    )


def cases() -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    torch.manual_seed(0)
    size = (EXPERTS, ROWS, row_bytes(COLUMNS, BITS))
    index_map = torch.randint(0, 256, size, dtype=torch.uint8)
    table = torch.randn(EXPERTS, ROWS, GROUPS, 1 << BITS)
    dense = torch.randn(EXPERTS, ROWS, COLUMNS)
    calls: dict[str, Callable[[], object]] = {}
    for tokens in TOKENS:
        chosen = torch.rand(tokens, EXPERTS).topk(CHOSEN).indices.flatten().sort().values
        offsets = torch.searchsorted(chosen, torch.arange(EXPERTS + 1))
        x = torch.randn(tokens * CHOSEN, COLUMNS)
        calls[f"lut_experts, tokens: {tokens}"] = partial(lut_experts, x, offsets, index_map, table)
        calls[f"a loop over experts, tokens: {tokens}"] = partial(
            by_expert, lambda x, e: lut_linear(x, index_map[e], table[e]), x, offsets
        )
        calls[f"dense experts, tokens: {tokens}"] = partial(
            by_expert, lambda x, e: torch.nn.functional.linear(x, dense[e]), x, offsets
        )
    return calls


def by_expert(product: Callable[[Tensor, int], Tensor], x: Tensor, offsets: Tensor) -> Tensor:
    """Return the products of each expert that has tokens, one after another."""
    spans = enumerate(itertools.pairwise(offsets.tolist()))
    return torch.cat(
        [product(x[start:end], expert) for expert, (start, end) in spans if end > start]
    )


if __name__ == "__main__":
    main()
