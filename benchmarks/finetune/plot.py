"""Draw held-out loss over peak memory from `finetune.json`: a point per method, at its best rate.

pip install -r benchmarks/peers.txt
python -m benchmarks.finetune.plot [--input FILE] [--output FILE]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.shared.drawing import PlotError, load_pyplot, run, save

from .methods import METHODS

_STYLES = {
    "sketch": ("tab:blue", "o", "sketch tables"),
    "affine": ("tab:cyan", "v", "affine sets"),
    "lora": ("tab:orange", "s", "LoRA, bfloat16 base"),
    "qlora": ("tab:green", "^", "QLoRA, NF4 base"),
    "full": ("tab:gray", "D", "all parameters"),
}
_GIGA = 1e9
# In points, for labels of 8 points:
_CHARACTER, _HEIGHT = 4.6, 10.0
_MARKER = 5.0  # half the side of a point's box
_ASIDE = 9.0  # from a point to its label
_LEVELS = (0, 1, -1, 2, -2, 3, -3, 4, -4)  # lines up or down that a label may make way

Box = tuple[float, float, float, float]
Row = dict[str, Any]


def main() -> int:
    return run("finetune", __doc__.splitlines()[0], read, draw, results="finetune.json")


def read(path: Path) -> dict[str, Any]:
    """Return a document that has held-out losses."""
    if not path.exists():
        raise PlotError(f"{path} does not exist: `python -m benchmarks.finetune` writes it")
    document: dict[str, Any] = json.loads(path.read_text())
    losses = [row["held_out_loss"] for row in document.get("summary", [])]
    if not losses or None in losses:
        raise PlotError(f"{path} has no held-out losses to draw")
    return document


def draw(document: dict[str, Any], output: Path) -> None:
    """Write the drawing, with the same bytes for the same figures."""
    pyplot = load_pyplot("finetune")

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for kind, (colour, marker, label) in _STYLES.items():
        rows = [row for row in document["summary"] if METHODS[row["method"]].kind == kind]
        if not rows:
            continue
        x, y = ([point(row)[axis] for row in rows] for axis in (0, 1))
        axes.plot(x, y, marker, color=colour, label=label)
    axes.margins(x=0.2, y=0.12)
    axes.grid(visible=True, linewidth=0.3)
    axes.set_xlabel("peak memory while training, GB")
    axes.set_ylabel("held-out loss")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
    settings = document["settings"]
    axes.set_title(
        f"{settings['model']}: {settings['steps']} steps of {settings['batch_size']} examples, "
        f"each method at its best learning rate",
        fontsize=9,
    )
    _label(axes, document["summary"])
    save(figure, output)
    pyplot.close(figure)


def point(row: Row) -> tuple[float, float]:
    return row["peak_bytes"] / _GIGA, row["held_out_loss"]


def _label(axes: Any, rows: list[Row]) -> None:
    """Write names right or left of the points, at the nearest free height."""
    axes.figure.tight_layout()
    points_per_pixel = 72 / axes.figure.dpi
    places = [axes.transData.transform(point(row)) * points_per_pixel for row in rows]
    taken = [(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y in places]
    for row, (x, y) in zip(rows, places, strict=True):
        width = _CHARACTER * len(name(row))
        boxes = [
            (left, middle - _HEIGHT / 2, left + width, middle + _HEIGHT / 2)
            for level in _LEVELS
            for middle in (y + level * _HEIGHT,)
            for left in (x + _ASIDE, x - _ASIDE - width)
        ]
        box = next((box for box in boxes if not any(_overlap(box, o) for o in taken)), boxes[0])
        taken.append(box)
        is_right = box[0] > x
        axes.annotate(
            name(row),
            point(row),
            xytext=((box[0] if is_right else box[2]) - x, (box[1] + box[3]) / 2 - y),
            textcoords="offset points",
            fontsize=8,
            horizontalalignment="left" if is_right else "right",
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "tab:gray", "shrinkA": 0},
        )


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def name(row: Row) -> str:
    """Return the label of a method; it includes a matched rank, which depends on the model."""
    if METHODS[row["method"]].rank is None and row["rank"]:
        return f"{row['method']} (r{row['rank']})"
    return str(row["method"])


if __name__ == "__main__":
    sys.exit(main())
