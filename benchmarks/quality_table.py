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
        parts = [row, *_continued(row, runs)]  # of a conversion, from the dense model on
        rows.append(
            (
                row["method"],
                f"{row['bits_per_weight']:.2f}",
                f"{row['model_bytes'] / 1e6:.1f}",
                f"{row['perplexity']:.2f}" if row["perplexity"] < 1e4 else "over 10,000",
                f"{row['nats_per_token'] - dense:.3f}",
                f"{sum(part['conversion_cpu_seconds'] for part in parts):.0f}",
                f"{max(part['conversion_peak_bytes'] for part in parts) / 1e9:.2f}",
            )
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def _continued(row: dict[str, Any], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The run whose results this one went on with, if it did. Raises PlotError without its row."""
    kind = row.get("continues")
    if kind is None:
        return []
    alike = {"kind": kind} | {key: row[key] for key in ("bits", "groups_per_row")}
    found = [other for other in runs if all(other[key] == alike[key] for key in alike)]
    if not found:
        raise PlotError(f"{row['method']} continues a run of {kind} that is not in the file")
    return found


if __name__ == "__main__":
    sys.exit(main())
