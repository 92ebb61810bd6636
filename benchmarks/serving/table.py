"""Print the figures of benchmarks/results/serving.json as the tables that docs/serving.md shows.

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


def tables(document: dict[str, Any]) -> list[str]:
    """Return speeds, and bars."""
    body = []
    for name, row in document["rows"].items():
        speeds = row["tokens_per_second"]
        body.append((name, f"{median(speeds):.1f}", f"{min(speeds):.1f} to {max(speeds):.1f}"))
    return [
        markdown(("decoding", "tokens/s", "turns"), body),
        bars_table("serving", document["bars"]),
    ]


@click.command(help=__doc__.partition("\n")[0] if __doc__ else None)
@click.option("--write", is_flag=True, help="Replace the tables in docs/serving.md.")
def main(write: bool) -> None:
    found = tables(json.loads((RESULTS / "serving.json").read_text()))
    if not write:
        click.echo("\n\n".join(found))
        return
    page = PAGE.read_text()
    for table in found:
        page = replaced(page, table)
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
