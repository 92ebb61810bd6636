"""Print the table of published models for docs/performance.md.

python -m benchmarks.reach.table
"""

from __future__ import annotations

import json
from typing import Any

import click

from benchmarks.shared.machine import RESULTS

_HEAD = "| model | GB | sketched, GB | times smaller | linear weights sketched | planned in |"


def table(document: dict[str, Any]) -> str:
    """Return the table of a results file, in Markdown.

    Args:
        document: The parsed `real_sizes.json`.
    """
    lines = [_HEAD, "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, row in document["models"].items():
        lines.append(
            f"| {name}{_options(row)} | {row['source_bytes'] / 1e9:,.1f} "
            f"| {row['sketched_bytes'] / 1e9:,.1f} | {row['ratio']:.2f} "
            f"| {row['linear_share']:.1%} "
            f"| {row['seconds']:.0f} s, {row['peak_resident_bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def _options(row: dict[str, Any]) -> str:
    """Return the options of a conversion that are not the defaults."""
    words = [f"`--{name.replace('_', '-')}`" for name in row["options"]]
    return f", {' '.join(words)}" if words else ""


if __name__ == "__main__":
    click.echo(table(json.loads((RESULTS / "real_sizes.json").read_text())))
