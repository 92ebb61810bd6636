"""Draw perplexity over bits per weight from `quality.json`: a line per method, a point per width.

pip install -r benchmarks/quality_peers.txt
python -m benchmarks.quality.plot [--input FILE] [--output FILE]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.shared.drawing import PlotError, load_pyplot, run, save

#: Colour, marker and name by kind of method and tables per row.
STYLES = {
    ("rtn", 1): ("tab:gray", "s", "round to nearest, g128"),
    ("nf4", 1): ("tab:brown", "D", "NF4, double quantization"),
    ("hqq", 1): ("tab:olive", "v", "HQQ, g64"),
    ("gptq", 1): ("tab:green", "^", "GPTQ, g64"),
    ("autoround", 1): ("tab:purple", "P", "AutoRound, g128"),
    ("leanquant", 1): ("tab:orange", "X", "LeanQuant's recipe"),
    ("guided", 1): ("tab:orange", "*", "LNQ with GuidedQuant"),
    ("llamacpp", 1): ("darkgoldenrod", "<", "llama.cpp, importance matrix"),
    ("hash", 4): ("tab:cyan", "d", "hash, GPR 4"),
    ("sketch-normal", 1): ("tab:red", "v", "sketch, effort normal, GPR 1"),
    ("sketch-normal", 4): ("tab:red", "<", "sketch, effort normal, GPR 4"),
    ("sketch", 1): ("tab:blue", "o", "sketch, effort fast, GPR 1"),
    ("sketch", 4): ("tab:blue", "h", "sketch, effort fast, GPR 4"),
    ("sketch-calibrated", 1): ("tab:red", "o", "sketch, calibrated, GPR 1"),
    ("sketch-calibrated", 4): ("tab:red", "h", "sketch, calibrated, GPR 4"),
    ("sketch-allocated", 1): ("tab:pink", "*", "sketch, calibrated, bits by layer"),
    ("sketch-healed", 1): ("black", "o", "sketch, healed, GPR 1"),
    ("sketch-healed", 4): ("black", "h", "sketch, healed, GPR 4"),
}
#: Points above this multiple of the dense model's perplexity are named, not drawn: they would
#: compress all others.
_CEILING = 4.0

Row = dict[str, Any]


def main() -> int:
    return run("quality", __doc__.splitlines()[0], read, draw, results="quality.json")


def read(path: Path) -> dict[str, Any]:
    """Return a document that has the dense model and something to compare with it."""
    if not path.exists():
        raise PlotError(f"{path} does not exist: `python -m benchmarks.quality` writes it")
    document: dict[str, Any] = json.loads(path.read_text())
    kinds = [row["kind"] for row in document.get("runs", [])]
    if "dense" not in kinds or len(kinds) < 2:
        raise PlotError(f"{path} needs runs of the dense model and of another, found {kinds}")
    return document


def draw(document: dict[str, Any], output: Path) -> None:
    """Write the drawing, with the same bytes for the same figures."""
    pyplot = load_pyplot("quality")

    (dense,) = (row for row in document["runs"] if row["kind"] == "dense")
    base = dense["perplexity"]
    inside, beyond = split(document["runs"], _CEILING * base)
    figure, axes = pyplot.subplots(figsize=(10, 5.4))
    axes.axhline(base, color="black", linestyle="--", linewidth=0.8, label="dense, 16 bits")
    for key, (colour, marker, label) in STYLES.items():
        rows = [row for row in inside if (row["kind"], row["groups_per_row"]) == key]
        if not rows:
            continue
        axes.plot(
            [row["bits_per_weight"] for row in rows],
            [row["perplexity"] for row in rows],
            color=colour,
            marker=marker,
            markersize=6,
            linewidth=0.8,
            linestyle=":" if key[1] > 1 else "-",
            label=label,
        )
    _dress(axes, document, base, [row["perplexity"] for row in inside])
    if beyond:
        axes.set_xlabel("bits per weight, tables and scales included\n\n" + _named(beyond))
    figure.tight_layout()
    save(figure, output)
    pyplot.close(figure)


def split(runs: list[Row], ceiling: float) -> tuple[list[Row], list[Row]]:
    """Return quantized runs up to a perplexity, by bits, and the runs above it."""
    ordered = sorted(runs, key=lambda row: (row["bits_per_weight"], row["method"]))
    rows = [row for row in ordered if row["kind"] != "dense"]
    inside = [row for row in rows if row["perplexity"] <= ceiling]
    return inside, [row for row in rows if row["perplexity"] > ceiling]


def _named(rows: list[Row]) -> str:
    names = [f"{row['method']} {row['perplexity']:.4g}" for row in rows]
    lines = [", ".join(names[first : first + 3]) for first in range(0, len(names), 3)]
    return "above the picture: " + ",\n".join(lines)


def _dress(axes: Any, document: dict[str, Any], base: float, found: list[float]) -> None:
    settings = document["settings"]
    axes.set_yscale("log")
    highest = max([*found, 1.2 * base])
    ticks = [
        round(base * factor, 1)
        for factor in (1, 1.1, 1.25, 1.5, 2, 3, 4)
        if base * factor < highest
    ]
    axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(visible=True, linewidth=0.3)
    axes.set_xlabel("bits per weight, tables and scales included")
    axes.set_ylabel("perplexity")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    axes.set_title(
        f"{settings['model']}: {settings['eval_tokens']:,} tokens of {settings['text']}; "
        f"calibrated on {settings['samples']} x {settings['seqlen']} others",
        fontsize=9,
    )


if __name__ == "__main__":
    sys.exit(main())
