"""Print the figures of two results files as the tables that docs/serving.md shows.

python -m benchmarks.serving.table
python -m benchmarks.serving.table --write        replaces the tables on the page
"""

from __future__ import annotations

import json
from statistics import median
from typing import Any

import click

from benchmarks.cpu.bars import bars_table
from benchmarks.cpu.tables import replaced
from benchmarks.shared.drawing import DOCS
from benchmarks.shared.machine import RESULTS
from benchmarks.shared.markdown import markdown

PAGE = DOCS / "serving.md"
#: How the tables of a results file begin: a processor without AMX, and one with it.
TITLES = {"serving.json": ("decoding", "serving"), "serving_amx.json": ("with AMX", "serving, AMX")}


def tables(file: str) -> list[str]:
    """Return speeds, and bars, of a results file."""
    document: dict[str, Any] = json.loads((RESULTS / file).read_text())
    title, bars_title = TITLES[file]
    body = []
    for name, row in document["rows"].items():
        speeds = row["tokens_per_second"]
        body.append((name, f"{median(speeds):.1f}", f"{min(speeds):.1f} to {max(speeds):.1f}"))
    return [
        markdown((title, "tokens/s", "turns"), body),
        bars_table(bars_title, document["bars"]),
    ]


@click.command(help=__doc__.partition("\n")[0] if __doc__ else None)
@click.option("--write", is_flag=True, help="Replace the tables in docs/serving.md.")
def main(write: bool) -> None:
    found = [table for file in TITLES for table in tables(file)]
    if not write:
        click.echo("\n\n".join(found))
        return
    page = PAGE.read_text()
    for table in found:
        page = replaced(page, table)
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
