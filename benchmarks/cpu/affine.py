"""Compare tokens of affine tenants on the CPU with tokens of the base.

One layer of 4096 x 4096 at 4 bits in float32. Each of 64 tokens has an affine set of its own, or
uses the base alone. For comparison, each tenant has full tables and a call of its own. For a single
token, the layer of a model with an active affine set computes its tables in each call. All calls
run in turn, several times; `relative` is the time of a call divided by the base's in the same
round.

    python -m benchmarks.cpu.affine [--output FILE]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cpu.bars import bars_table, judged
from benchmarks.shared.machine import RESULTS, machine, quantiles, versions, write_results
from spallm_formats import row_bytes
from spallm_kernels import lut_linear, lut_linear_affine

from .turns import Row

ROWS = COLUMNS = 4096
BITS = 4
TENANTS = 64
GROUPS = (1, 4)
ROUNDS, SINGLE_ROUNDS = 22, 202
LIMIT = 1.3  # times the base, with one group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "affine.json")
    output = parser.parse_args().output
    groups = {
        str(number): time_in_turn(cases(number), ROUNDS)
        | time_in_turn(single_token(number), SINGLE_ROUNDS)
        for number in GROUPS
    }
    for number, found in groups.items():
        for name, row in found.items():
            milliseconds, relative = row["milliseconds"]["p50"], row["relative"]["p50"]
            print(f"groups: {number}  {name:32} {milliseconds:8.2f} ms, {relative:5.2f} x base")
    bars = judge(groups)
    print(bars_table("affine sets", bars))
    write_results(
        output,
        {
            "benchmark": "affine",
            "machine": machine() | {"threads": torch.get_num_threads()},
            "versions": versions("torch", "numba", "numpy", "spallm-convert"),
            "settings": {
                "in_features": COLUMNS,
                "out_features": ROWS,
                "bits": BITS,
                "tokens": TENANTS,
                "tenants": TENANTS,
                "dtype": "float32",
                "rounds": ROUNDS - 2,
                "rounds_of_single_tokens": SINGLE_ROUNDS - 2,
            },
            "groups_per_row": groups,
            "bars": bars,
        },
    )


def judge(groups: dict[str, dict[str, Row]]) -> list[Row]:
    """Return the bar, for one group."""
    figure = groups["1"]["affine tenants"]["relative"]["p50"]
    return [judged(f"{TENANTS} affine tenants, times the base", "<=", LIMIT, figure)]


def time_in_turn(
    calls: dict[str, Callable[[], object]], rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Return times in milliseconds, and relative to the first call, by name of the call.

    The first two rounds are dropped.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append(1000 * (time.perf_counter() - start))
    first = next(iter(samples.values()))[2:]
    return {
        name: {
            "milliseconds": quantiles(times[2:]),
            "relative": quantiles([a / b for a, b in zip(times[2:], first, strict=True)]),
        }
        for name, times in samples.items()
    }


def cases(groups: int) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name; the base is the first."""
    index_map, table, shift, scale = layer(groups)
    x = torch.randn(TENANTS, COLUMNS)
    sets = torch.randperm(TENANTS)
    full = shift[..., None] + scale[..., None] * table
    return {
        "base": partial(lut_linear, x, index_map, table),
        "affine tenants": partial(lut_linear_affine, x, index_map, table, shift, scale, sets),
        "full tables, a call per tenant": partial(by_tenant, x, index_map, full, sets),
    }


def single_token(groups: int) -> dict[str, Callable[[], object]]:
    """Return what is timed for a single token; the base is the first."""
    index_map, table, shift, scale = layer(groups)
    x = torch.randn(1, COLUMNS)
    numbers = shift[0, :, :, None], scale[0, :, :, None]
    return {
        "base, 1 token": partial(lut_linear, x, index_map, table),
        "active affine set, 1 token": lambda: lut_linear(
            x, index_map, torch.addcmul(numbers[0], numbers[1], table)
        ),
    }


def layer(groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return an index map, tables, and the shifts and scales of all tenants."""
    torch.manual_seed(0)
    index_map = torch.randint(0, 256, (ROWS, row_bytes(COLUMNS, BITS)), dtype=torch.uint8)
    table = torch.randn(ROWS, groups, 1 << BITS)
    shift = 0.01 * torch.randn(TENANTS, ROWS, groups)
    return index_map, table, shift, 1 + 0.01 * torch.randn(TENANTS, ROWS, groups)


def by_tenant(x: Tensor, index_map: Tensor, tables: Tensor, sets: Tensor) -> Tensor:
    """Return the products of all tenants, one after another."""
    calls = zip(x[:, None], sets.tolist(), strict=True)
    return torch.cat([lut_linear(token, index_map, tables[slot]) for token, slot in calls])


if __name__ == "__main__":
    main()
