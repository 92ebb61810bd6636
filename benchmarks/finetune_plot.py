"""Draws held-out loss over peak memory from `finetune.json`: one point a method, at its best rate.

pip install -r benchmarks/peers.txt
python benchmarks/finetune_plot.py [--input FILE] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import RESULTS
from finetune_methods import METHODS
from plot import PlotError

_DRAWING = Path(__file__).resolve().parent.parent / "docs" / "finetune.svg"
_STYLES = {
    "sketch": ("tab:blue", "o", "sketch tables"),
    "lora": ("tab:orange", "s", "LoRA, bfloat16 base"),
    "qlora": ("tab:green", "^", "QLoRA, NF4 base"),
    "full": ("tab:gray", "D", "all parameters"),
}
_GIGA = 1e9
_LINE = 13  # points between labels, above their font size
_ASIDE = 14  # points between a point and its label

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, default=RESULTS / "finetune.json")
    parser.add_argument("--output", type=Path, default=_DRAWING)
    options = parser.parse_args()
    try:
        draw(read(options.input), options.output)
    except PlotError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"written to {options.output}")
    return 0


def read(path: Path) -> dict[str, Any]:
    """A document with held-out losses."""
    if not path.exists():
        raise PlotError(f"{path} does not exist: benchmarks/finetune.py writes it")
    document: dict[str, Any] = json.loads(path.read_text())
    losses = [row["held_out_loss"] for row in document.get("summary", [])]
    if not losses or None in losses:
        raise PlotError(f"{path} has no held-out losses to draw")
    return document


def draw(document: dict[str, Any], output: Path) -> None:
    """Writes the drawing, the same bytes for the same figures."""
    try:
        import matplotlib
    except ImportError:
        raise PlotError("plotting needs matplotlib: pip install matplotlib") from None
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "finetune", "svg.fonttype": "none"}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for kind, (colour, marker, label) in _STYLES.items():
        rows = [row for row in document["summary"] if METHODS[row["method"]].kind == kind]
        x, y = ([point(row)[axis] for row in rows] for axis in (0, 1))
        axes.plot(x, y, marker, color=colour, label=label)
    axes.margins(x=0.2, y=0.12)
    axes.grid(visible=True, linewidth=0.3)
    axes.set_xlabel("peak memory while training, GB")
    axes.set_ylabel("held-out loss")
    axes.legend(fontsize=8)
    _label(axes, document["summary"])
    settings = document["settings"]
    axes.set_title(
        f"{settings['model']}: {settings['steps']} steps of {settings['batch_size']} examples, "
        f"each method at its best learning rate",
        fontsize=9,
    )
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None})
    pyplot.close(figure)


def point(row: Row) -> tuple[float, float]:
    return row["peak_bytes"] / _GIGA, row["held_out_loss"]


def _label(axes: Any, rows: list[Row]) -> None:
    """Names beside the points, right of them; where lines would overlap, further down.

    Lines are thin enough that only labels of points near each other have to make way.
    """
    points_per_pixel = 72 / axes.figure.dpi
    below = sorted(rows, key=lambda row: (-row["held_out_loss"], row["peak_bytes"]))
    placed: list[tuple[float, float, float]] = []
    for row in below:
        x, y = axes.transData.transform(point(row)) * points_per_pixel
        text = name(row)
        left, level, width = x + _ASIDE, y, 4.6 * len(text)
        for other_left, other_level, other_width in placed:
            aside = left > other_left + other_width or other_left > left + width
            if not aside and abs(level - other_level) < _LINE:
                level = other_level - _LINE
        placed.append((left, level, width))
        axes.annotate(
            text,
            point(row),
            xytext=(_ASIDE, level - y),
            textcoords="offset points",
            fontsize=8,
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "tab:gray"},
        )


def name(row: Row) -> str:
    """A method as it is labelled: the rank that was matched is said, as it depends on the model."""
    if METHODS[row["method"]].rank is None and row["rank"]:
        return f"{row['method']} (r{row['rank']})"
    return str(row["method"])


if __name__ == "__main__":
    sys.exit(main())
