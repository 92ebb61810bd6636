"""Compare the sketched linear layer on the CPU, for each backend and path, with the dense layer.

One layer of Llama-3-8B (4096 x 4096, 4 bits, 4 groups) in float32: looking up the dense weight, the
gradient of the table, and the product for several numbers of tokens. All calls run in turn, several
times.

    python -m benchmarks.cpu.linear [--output FILE]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.shared.machine import RESULTS, machine, quantiles, versions, write_results
from spallm_formats import row_bytes
from spallm_kernels import lut_linear
from spallm_kernels.dispatch import PATHS, load_backend

FEATURES, BITS, GROUPS = 4096, 4, 4
ROUNDS = 12
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
BACKENDS = ("cpu", "reference")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "linear.json")
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
        rate = FEATURES * FEATURES / levels["p50"] / 1000
        print(f"{name:32} {levels['p50']:8.1f} ms  {rate:8.0f} M weights/s")
    write_results(
        output,
        {
            "benchmark": "linear",
            "machine": machine(),
            "versions": versions("torch", "numba", "numpy", "spallm-convert"),
            "settings": {"features": FEATURES, "bits": BITS, "groups_per_row": GROUPS},
            "milliseconds": milliseconds,
        },
    )


def cases() -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    index_map = torch.randint(0, 256, (FEATURES, row_bytes(FEATURES, BITS)), dtype=torch.uint8)
    table = torch.randn(FEATURES, GROUPS, 1 << BITS)
    gradient = torch.randn(FEATURES, FEATURES)
    dense = torch.randn(FEATURES, FEATURES)
    calls: dict[str, Callable[[], object]] = {}
    for name in BACKENDS:
        backend = load_backend(name)
        calls[f"{name}: dequantize"] = partial(backend.dequantize, index_map, table, FEATURES)
        calls[f"{name}: table gradient"] = partial(backend.table_grad, gradient, index_map, table)
    for tokens in TOKENS:
        x = torch.randn(tokens, FEATURES)
        calls[f"dense layer, tokens: {tokens}"] = partial(torch.nn.functional.linear, x, dense)
        for path in PATHS:
            calls[f"cpu: {path} path, tokens: {tokens}"] = partial(
                lut_linear, x, index_map, table, backend="cpu", path=path
            )
    token = torch.randn(1, FEATURES)
    calls["reference: tokens: 1"] = partial(
        lut_linear, token, index_map, table, backend="reference"
    )
    return calls


if __name__ == "__main__":
    main()
