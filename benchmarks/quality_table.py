"""Prints the runs of `quality.json` as a table in Markdown, by width and perplexity.

python benchmarks/quality_table.py [--input FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from common import RESULTS
from plot import PlotError
from quality_plot import read

_HEAD = (
    "method",
    "bits per weight",
    "model, MB",
    "perplexity",
    "nats per token above dense",
    "CPU seconds",
    "peak, GB",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, default=RESULTS / "quality.json")
    try:
        print(table(read(parser.parse_args().input)["runs"]))
    except PlotError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def table(runs: list[dict[str, Any]]) -> str:
    """The table; runs of the same width stand together, the best of them first."""
    (dense,) = (row["nats_per_token"] for row in runs if row["kind"] == "dense")
    rows = [_HEAD, ("---", *["---:"] * (len(_HEAD) - 1))]
    for row in sorted(runs, key=lambda row: (-row["bits"], row["nats_per_token"])):
        rows.append(
            (
                row["method"],
                f"{row['bits_per_weight']:.2f}",
                f"{row['model_bytes'] / 1e6:.1f}",
                f"{row['perplexity']:.2f}" if row["perplexity"] < 1e4 else "over 10,000",
                f"{row['nats_per_token'] - dense:.3f}",
                f"{_cpu_seconds(row, runs):.0f}",
                f"{row['conversion_peak_bytes'] / 1e9:.2f}",
            )
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def _cpu_seconds(row: dict[str, Any], runs: list[dict[str, Any]]) -> float:
    """Of a conversion, from the dense model on: with the run that this one continues."""
    alike = ("bits", "groups_per_row")
    before = [
        other["conversion_cpu_seconds"]
        for other in runs
        if other["kind"] == row.get("continues") and all(other[k] == row[k] for k in alike)
    ]
    return float(row["conversion_cpu_seconds"]) + sum(before)


if __name__ == "__main__":
    sys.exit(main())
