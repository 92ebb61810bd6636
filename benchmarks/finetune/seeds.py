"""Print what methods reached with several seeds as the table that docs/quality.md shows.

    for SEED in 0 1 2; do python -m benchmarks.finetune --data FOLDER --seed $SEED --steps 60 \\
        --held-out 160 --method affine-4bit-gpr4 --method sketch-4bit-gpr4 --method lora-r4 \\
        --affine-rates 1e-3 --sketch-rates 3e-4 --lora-rates 1e-3 \\
        --output benchmarks/results/finetune_affine_$SEED.json; done
    python -m benchmarks.finetune.seeds [--write]
"""

from __future__ import annotations

import json
from statistics import mean
from typing import Any

import click

from benchmarks.cpu.tables import replaced
from benchmarks.shared.drawing import DOCS
from benchmarks.shared.machine import RESULTS
from benchmarks.shared.markdown import markdown

PAGE = DOCS / "quality.md"
FILES = [f"finetune_affine_{seed}.json" for seed in range(3)]


def table() -> str:
    """Return the held-out loss of each method and seed, and the means of loss and accuracy."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for file in FILES:
        document = json.loads((RESULTS / file).read_text())
        for row in document["runs"]:
            before = row["learning_rate"] is None
            name = f"{row['base']}, not trained" if before else row["method"]
            runs.setdefault(name, []).append(row)
    body = []
    for name, rows in runs.items():
        losses = [row["held_out"]["loss"] for row in rows]
        accuracy = mean(row["held_out"]["accuracy"] for row in rows)
        trained = rows[0]["trainable_parameters"] / 1e6
        body.append(
            (
                name,
                "" if rows[0]["learning_rate"] is None else f"{trained:.2f} M",
                *(f"{loss:.3f}" for loss in losses),
                f"{mean(losses):.3f}",
                f"{100 * accuracy:.1f} %",
            )
        )
    seeds = (f"loss, seed {number}" for number in range(len(FILES)))
    return markdown(("three seeds", "trained", *seeds, "mean loss", "mean accuracy"), body)


@click.command(help=__doc__.partition("\n")[0] if __doc__ else None)
@click.option("--write", is_flag=True, help="Replace the table in docs/quality.md.")
def main(write: bool) -> None:
    if write:
        PAGE.write_text(replaced(PAGE.read_text(), table()))
    else:
        click.echo(table())


if __name__ == "__main__":
    main()
