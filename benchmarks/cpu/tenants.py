"""Compare tokens of 16 tenants on the CPU with tokens of one, for one sketched layer.

4096 -> 4096, 16 tokens. All tokens have the tables of the base, or each has tables of its own; a
loop over the tenants makes a product for each token. Reading the tables of all tenants once is
timed too. All of them run in turn, several times.

    python -m benchmarks.cpu.tenants [--output FILE] [--turns N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.shared.machine import RESULTS, machine, versions, write_results
from spallm_formats import row_bytes
from spallm_kernels import lut_linear, lut_linear_sets

from .bars import judged
from .turns import Row, milliseconds

SIZE, TOKENS = 4096, 16
#: Bits and groups of a row.
SKETCHES = ((4, 1), (3, 1), (2, 1), (4, 4))
DTYPES = (torch.float32, torch.bfloat16)
TURNS = 40
#: The most that tokens of 16 sets may take, compared with tokens of one set, once the time for
#: reading the tables is taken off.
BAR = 1.5

LAYER, ONE, MIXED, LOOP, READ = "lut_linear", "one set", "16 sets", "a loop", "reading tables"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "tenants.json")
    parser.add_argument("--turns", type=int, default=TURNS)
    arguments = parser.parse_args()
    rows = []
    for bits, groups in SKETCHES:
        for dtype in DTYPES:
            rows.append(measure(bits, groups, dtype, SIZE, arguments.turns))
            print(rows[-1], flush=True)
    write_results(
        arguments.output,
        {
            "benchmark": "tenants",
            "machine": machine(),
            "versions": versions("torch", "numba", "numpy", "spallm-convert"),
            "settings": {
                "in_features": SIZE,
                "out_features": SIZE,
                "tokens": TOKENS,
                "sets": TOKENS,
                "threads": torch.get_num_threads(),
                "turns": arguments.turns,
            },
            "rows": rows,
            "bars": judge(rows),
        },
    )


def judge(rows: list[Row]) -> list[Row]:
    """Return the bars, for 4 bits and one group."""
    return [
        judged(f"{row['inputs']}, 16 sets, time over that of one", "<=", BAR, slower(row))
        for row in rows
        if (row["bits"], row["groups_per_row"]) == SKETCHES[0]
    ]


def slower(row: Row) -> float:
    """Return how much longer 16 sets take than one, without the time for reading the tables."""
    times = {name: found["p50"] for name, found in row["milliseconds"].items()}
    return float((times[MIXED] - times[READ]) / times[ONE])


def measure(bits: int, groups: int, dtype: torch.dtype, size: int, turns: int) -> Row:
    """Return the times for a kind of sketch."""
    return {
        "bits": bits,
        "groups_per_row": groups,
        "inputs": str(dtype).removeprefix("torch."),
        **milliseconds(contestants(bits, groups, dtype, size), turns),
    }


def contestants(
    bits: int, groups: int, dtype: torch.dtype, size: int
) -> dict[str, Callable[[int], object]]:
    """Return what is timed, by name. Tables are float32, as they are trained."""
    torch.manual_seed(0)
    index_map = torch.randint(0, 256, (size, row_bytes(size, bits)), dtype=torch.uint8)
    tables = torch.randn(1 + TOKENS, size, groups, 1 << bits)
    table, tables = tables[0], tables[1:]
    x = torch.randn(TOKENS, size).to(dtype)
    multiply = partial(lut_linear_sets, x, index_map, table, tables)
    base, mixed = torch.full((TOKENS,), -1), torch.arange(TOKENS)
    return {
        LAYER: lambda _: lut_linear(x, index_map, table),
        ONE: lambda _: multiply(base),
        MIXED: lambda _: multiply(mixed),
        LOOP: lambda _: by_token(x, index_map, tables),
        READ: lambda _: tables.sum(),
    }


def by_token(x: Tensor, index_map: Tensor, tables: Tensor) -> Tensor:
    """Return the product of each token with its own tables, one after another."""
    pairs = zip(x.split(1), tables, strict=True)
    return torch.cat([lut_linear(token, index_map, own) for token, own in pairs])


if __name__ == "__main__":
    main()
