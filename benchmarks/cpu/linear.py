"""Compare the sketched linear layer on the CPU with the dense layer, for each vector unit.

One layer of Llama-3-8B (4096 x 4096, 4 groups, bfloat16 tables). Timed are the product for several
numbers of tokens and widths, dequantizing, the gradients, and both paths of a product where one
becomes faster than the other. The dense layer takes turns with ours in the same process, in float32
and in bfloat16. The unit of this machine comes first, then the others that it has, and the loops
that need none: each in a process of its own (`SPALLM_CPU`).

    python -m benchmarks.cpu.linear            writes benchmarks/results/linear.json
    python -m benchmarks.cpu.linear --unit amx --unit avx512 --output FILE
                                               with AMX; FILE is linear_amx.json beside it
    python -m benchmarks.cpu.tables            prints the tables of docs/performance.md
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.shared.machine import RESULTS, machine, versions, write_results
from benchmarks.shared.processes import run_in_process
from spallm_kernels.cpu.vector_units import CHOICE, PORTABLE, available_units

from .bars import bars_table, judged
from .turns import Row, ratio

_RUN = "benchmarks.cpu.linear_turns"
_PACKAGES = ("torch", "numba", "numpy", "spallm-convert")
#: Numbers of tokens: of products, of gradients, and where the fastest path changes.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
MANY = (128, 512)
AROUND = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
WIDTHS = (4, 3, 2)
_FASTER = {1: {"float32": 4.0, "bfloat16": 2.0}, 8: {"float32": 2.0}, 32: {"float32": 1.2}}
_NOT_MUCH_SLOWER = 1.15


def units() -> list[str]:
    """Return the vector units of this machine, the fastest first, and the portable loops."""
    return [*available_units(), PORTABLE]


def product(unit: Row, tokens: int) -> Row:
    """Return the row of a number of tokens."""
    (found,) = (
        row for row in unit["rows"] if row["section"] == "products" and row["tokens"] == tokens
    )
    return dict(found)


def judge(unit: Row) -> list[Row]:
    """Return the bars of the fastest unit."""
    bars = []
    for tokens, limits in _FASTER.items():
        for dtype, limit in limits.items():
            figure = ratio(product(unit, tokens), f"dense {dtype}", f"sketch {dtype}")
            name = f"{tokens} token{'s' * (tokens > 1)}, dense {dtype}'s time over ours"
            bars.append(judged(name, ">=", limit, figure))
    for tokens in MANY:
        for dtype in ("float32", "bfloat16"):
            figure = ratio(product(unit, tokens), f"sketch {dtype}", f"dense {dtype}")
            name = f"{tokens} tokens, our time over dense {dtype}'s"
            bars.append(judged(name, "<=", _NOT_MUCH_SLOWER, figure))
    (widths,) = (row for row in unit["rows"] if row["section"] == "widths")
    for bits in WIDTHS[1:]:
        figure = ratio(widths, f"{bits} bits, float32", f"{WIDTHS[0]} bits, float32")
        name = f"{bits} bits, 1 token, time over that of {WIDTHS[0]} bits"
        bars.append(judged(name, "<=", 1.0, figure))
    return bars


def most_decoded(unit: Row) -> list[Row]:
    """Return up to how many tokens the decode path is the faster one, by inputs and codes.

    tokens: None if the dense path is the faster one already for the fewest tokens measured.
    """
    found: dict[tuple[str, bool], list[Row]] = {}
    for row in unit["rows"]:
        if row["section"] == "paths":
            found.setdefault((row["inputs"], row["hashed"]), []).append(row)
    result = []
    for (inputs, hashed), rows in found.items():
        most = None
        for row in sorted(rows, key=lambda row: row["tokens"]):
            if ratio(row, "decode", "dense") > 1:
                break
            most = row["tokens"]
        result.append({"inputs": inputs, "hashed": hashed, "tokens": most})
    return result


@click.command(context_settings={"show_default": True})
@click.option("--features", type=click.IntRange(min=16), default=4096, help="Rows and columns.")
@click.option("--groups-per-row", type=click.IntRange(min=1), default=4, help="Tables per row.")
@click.option("--turns", type=click.IntRange(min=1), default=15, help="Timed turns.")
@click.option(
    "--unit",
    "chosen",
    type=click.Choice(units()),
    multiple=True,
    default=units(),
    show_default="all",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=RESULTS / "linear.json",
    show_default="benchmarks/results/linear.json",
)
def main(
    features: int, groups_per_row: int, turns: int, chosen: tuple[str, ...], output: Path
) -> None:
    """Compare the sketched linear layer with the dense layer."""
    job: dict[str, Any] = {
        "features": features,
        "groups": groups_per_row,
        "turns": turns,
        "tokens": TOKENS,
        "widths": WIDTHS,
        "many": MANY,
        "around": AROUND,
    }
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen:
            unit = run_in_process(_RUN, job, Path(scratch), {CHOICE: name})
            if unit is None:
                raise click.ClickException(f"measuring {name} failed")
            for row in most_decoded(unit):
                codes = "hashed" if row["hashed"] else "stored"
                click.echo(f"  decode up to {row['tokens']} tokens: {row['inputs']}, {codes} codes")
            found.append(unit)
    bars = judge(found[0])
    document = {
        "benchmark": "linear",
        "machine": machine(),
        "versions": versions(*_PACKAGES),
        "settings": {"features": features, "groups_per_row": groups_per_row, "turns": turns},
        "units": found,
        "bars": bars,
    }
    write_results(output, document)
    click.echo(f"{bars_table('the layer', bars)}\nwritten to {output}")


if __name__ == "__main__":
    main()
