"""Draw benchmark results: the command line, the error, and SVG files with reproducible bytes.

matplotlib is not a dependency of the package: `pip install matplotlib`, or `benchmarks/peers.txt`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .machine import RESULTS, ROOT

DOCS = ROOT / "docs"

Document = dict[str, Any]


class PlotError(Exception):
    """Report why there is nothing to draw."""


def run(
    name: str,
    about: str,
    read: Callable[[Path], Document],
    draw: Callable[[Document, Path], None],
    *,
    results: str,
) -> int:
    """Draw a results file into docs/NAME.svg, or as options say; return the exit code."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--input", type=Path, default=RESULTS / results)
    parser.add_argument("--output", type=Path, default=DOCS / f"{name}.svg")
    options = parser.parse_args()
    try:
        draw(read(options.input), options.output)
    except PlotError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"written to {options.output}")
    return 0


def load_pyplot(name: str) -> Any:
    """Return matplotlib's pyplot, set up to write the same SVG for the same figures."""
    try:
        import matplotlib
    except ImportError:
        raise PlotError("plotting needs matplotlib: pip install matplotlib") from None
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": name, "svg.fonttype": "none"}
    from matplotlib import pyplot as module

    return module


def save(figure: Any, output: Path) -> None:
    """Write a figure as SVG, without the date."""
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None})
