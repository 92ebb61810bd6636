"""Draw the roofline of the layer from `gpu.json`: bandwidth reached over tokens, a panel per layer.

A product needs at least the time to read its operands at the speed of a copy, and at least the time
to multiply at the speed of a large matmul; both speeds are measured in the same run. The roof is
the bandwidth at that time. For many tokens the sketched layer has a lower roof, because it has
fewer bytes to read.

    pip install matplotlib        (it is not a dependency of the package)
    python -m benchmarks.gpu.roofline [--input FILE] [--output FILE]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.shared.drawing import PlotError, load_pyplot, run, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Row = dict[str, Any]

_TICKS = (1, 8, 64, 512, 4096)
_STYLES = {
    "ours": ("tab:blue", "o", "sketched, 4 bits"),
    "cublas": ("tab:gray", "s", "cuBLAS bf16"),
}


def main() -> int:
    return run("roofline", __doc__.splitlines()[0], read, draw, results="gpu.json")


def read(path: Path) -> dict[str, Any]:
    """Return the document of a run that has the figures to draw."""
    if not path.exists():
        raise PlotError(f"{path} does not exist: `make gpu` writes it, on a machine with a GPU")
    document: dict[str, Any] = json.loads(path.read_text())
    if document["smoke"]:
        raise PlotError(f"{path} is of a smoke run and holds no figures")
    missing = [
        name
        for name in ("ceilings", "forward")
        if not document["sections"].get(name, {}).get("rows")
    ]
    if missing:
        raise PlotError(f"{path} has no rows in {' and '.join(missing)}")
    return document


def draw(document: dict[str, Any], output: Path) -> None:
    """Write the drawing, with the same bytes for the same figures."""
    pyplot = load_pyplot("roofline")

    ceilings = {row["what"]: row for row in document["sections"]["ceilings"]["rows"]}
    copy = ceilings["copy"]["gigabytes_per_second"]
    peak = ceilings["matmul"]["teraflops"]
    panels: dict[str, list[Row]] = {}
    for row in sorted(document["sections"]["forward"]["rows"], key=lambda row: row["tokens"]):
        panels.setdefault(row["layer"], []).append(row)
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 3.8), sharey=True, squeeze=False
    )
    for axes, (layer, rows) in zip(grid[0], panels.items(), strict=True):
        _draw_layer(axes, layer, rows, copy, peak)
    grid[0][0].set_ylabel("GB/s of weights, x and y")
    grid[0][-1].legend(fontsize=8, loc="lower left")
    device, versions = document["device"], document["versions"]
    figure.suptitle(
        f"{device['name']}: a copy reaches {copy:.0f} GB/s, a matmul {peak:.0f} TFLOP/s "
        f"(torch {versions['torch']}, triton {versions['triton']})",
        fontsize=10,
    )
    figure.tight_layout()
    save(figure, output)
    pyplot.close(figure)


def _draw_layer(axes: Axes, layer: str, rows: list[Row], copy: float, peak: float) -> None:
    """Draw medians with the spread from p20 to p80, and the roof of each contestant."""
    tokens = [row["tokens"] for row in rows]
    for name, (colour, marker, label) in _STYLES.items():
        rates = [row["gigabytes_per_second"][name] for row in rows]
        axes.plot(tokens, rates, color=colour, marker=marker, markersize=4, label=label)
        low, high = (
            [row["bytes"][name] / row["us"][name][level] / 1e3 for row in rows]
            for level in ("p80", "p20")
        )
        axes.fill_between(tokens, low, high, color=colour, alpha=0.25, linewidth=0)
        roof = [
            min(copy, row["bytes"][name] / _seconds_to_multiply(row, peak) / 1e9) for row in rows
        ]
        axes.plot(tokens, roof, color=colour, linestyle="--", linewidth=1, label="its roof")
    axes.set_xscale("log", base=2)
    axes.set_xticks(_TICKS, labels=[str(count) for count in _TICKS])
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_title(layer, fontsize=9)
    axes.grid(visible=True, which="both", linewidth=0.3)


def _seconds_to_multiply(row: Row, peak: float) -> float:
    out_features, in_features = map(int, row["layer"].split("x"))
    return 2 * row["tokens"] * out_features * in_features / (peak * 1e12)


if __name__ == "__main__":
    sys.exit(main())
