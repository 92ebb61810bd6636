"""Plan large published models from made-up headers, and write how much smaller they become.

Each model is planned in a process of its own, which reports its peak memory. Nothing is downloaded.

    python -m benchmarks.reach                writes benchmarks/results/real_sizes.json
    python -m benchmarks.reach --only Mixtral-8x7B --output some.json
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

import click

from benchmarks.shared.machine import RESULTS, machine, versions, write_results
from benchmarks.shared.processes import run_in_process

from .models import PUBLISHED

_PACKAGES = ("torch", "transformers", "spallm-convert")
#: The ratio that every model is expected to reach at 4 bits.
LEAST_RATIO = 3.4


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(PUBLISHED)), help="Model to plan.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS / "real_sizes.json")
def main(only: tuple[str, ...], output: Path) -> None:
    """Plan every model and write the figures."""
    found = {}
    for name in only or PUBLISHED:
        with tempfile.TemporaryDirectory() as scratch:
            row = run_in_process(
                "benchmarks.reach.one_plan", asdict(PUBLISHED[name]), Path(scratch)
            )
        if row is None:
            raise click.ClickException(f"{name} was not planned")
        found[name] = row
        click.echo(
            f"{name}: {row['ratio']:.2f} times smaller, {row['linear_share']:.1%} of linear "
            f"weights, {row['seconds']:.1f} s, {row['peak_resident_bytes'] / 1e6:,.0f} MB"
        )
    header = {"benchmark": "real sizes", "machine": machine(), "versions": versions(*_PACKAGES)}
    write_results(output, header | {"least_ratio": LEAST_RATIO, "models": found})


if __name__ == "__main__":
    main()
