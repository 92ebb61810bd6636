"""Print the figures of `gpu.json` as the Markdown tables that docs/performance.md shows.

A test compares the page with these tables, so the page holds no figure that was not measured.

    python -m benchmarks.gpu.table [--input FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.shared.drawing import PlotError
from benchmarks.shared.machine import RESULTS
from benchmarks.shared.markdown import markdown

from .roofline import read

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, default=RESULTS / "gpu.json")
    try:
        print("\n\n".join(tables(read(parser.parse_args().input))))
    except PlotError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def tables(document: dict[str, Any]) -> list[str]:
    """Return all tables, in the order of the page."""
    rows = {name: section["rows"] for name, section in document["sections"].items()}
    return [
        _products(rows["forward"]),
        _widths(rows["widths"]),
        _training(rows["backward"], rows["memory"]),
        _rivals(rows["published"], rows["nf4"]),
        _model(rows["model"][0], rows["block"][0]),
        _tenants(rows["tenants"]),
        _affine(rows["affine"]),
        _experts(rows["experts"]),
        _sketching(rows["conversion"]),
        _bars(document["bars"]),
    ]


def _products(rows: list[Row]) -> str:
    counts = sorted({row["tokens"] for row in rows})
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    times = {(row["layer"], row["tokens"]): row["us"] for row in rows}
    body = [
        (str(count), *(_pair(times[layer, count], "ours", "cublas") for layer in layers))
        for count in counts
    ]
    return markdown(("tokens", *layers), body)


def _widths(rows: list[Row]) -> str:
    names = list(rows[0]["us"])
    body = [(row["layer"], *(f"{row['us'][name]['p50']:.1f}" for name in names)) for row in rows]
    return markdown(("layer", *names), body)


def _training(rows: list[Row], memory: list[Row]) -> str:
    peaks = {row["layer"]: row["ours_times_dense_weight"]["peak"] for row in memory}
    body = [
        (
            row["layer"],
            f"{row['us_graph']['ours']['p50']:.0f}",
            f"{row['us_graph']['dense']['p50']:.0f}",
            f"{row['time_over_dense_graph']:.2f}",
            f"{row['time_over_dense']:.2f}",
            f"{peaks[row['layer']]:.2f}",
        )
        for row in rows
    ]
    head = ("layer", "ours, us", "dense, us", "ratio", "ratio without a graph", "peak memory")
    return markdown(head, body)


def _rivals(published: list[Row], nf4: list[Row]) -> str:
    body = []
    for row in (*published, *nf4):
        what = "1 token" if row["tokens"] == 1 else f"{row['tokens']} tokens"
        if row["tokens"] > 16:
            what += ", forward and backward"
        for name, speedup in row["speedup"].items():
            if name != "cublas":
                ours, theirs = row["us"]["ours"]["p50"], row["us"][name]["p50"]
                body.append(
                    (row["layer"], what, name, f"{ours:.1f}", f"{theirs:.1f}", f"{speedup:.2f} x")
                )
    return markdown(("layer", "what", "other runtime", "ours, us", "theirs, us", "ours is"), body)


def _model(model: Row, block: Row) -> str:
    replayed, eager = model["tokens_per_second"], model["tokens_per_second_eager"]
    size = model["parameter_bytes"]
    body = [
        ("seven layers of a block, us", *_both(block["us"], "ours", "cublas", ".1f")),
        ("tokens/s, graph of a step", f"{replayed['ours']:.1f}", f"{replayed['dense']:.1f}"),
        ("tokens/s, no graph", f"{eager['ours']:.1f}", f"{eager['dense']:.1f}"),
        ("parameters, GB", f"{size['ours'] / 1e9:.2f}", f"{size['dense'] / 1e9:.2f}"),
    ]
    return markdown(("Llama-3-8B, 4 bits, one sequence", "sketched", "dense bf16"), body)


def _tenants(rows: list[Row]) -> str:
    names = list(rows[0]["us"])
    body = [
        (
            row["layer"],
            str(row["tokens"]),
            *(f"{row['us'][name]['p50']:.1f}" for name in names),
            f"{row['times_one_set']:.2f} x",
        )
        for row in rows
    ]
    return markdown(("layer", "tokens", *names, "compared with one set"), body)


def _affine(rows: list[Row]) -> str:
    body = [
        (
            row["layer"],
            str(row["groups_per_row"]),
            *_both(row["us"], "lut_linear", "affine", ".1f"),
            f"{row['times_lut_linear']:.2f} x",
        )
        for row in rows
    ]
    return markdown(("layer", "groups", "lut_linear, us", "affine sets, us", "ratio"), body)


def _experts(rows: list[Row]) -> str:
    names = list(rows[0]["us"])
    body = [
        (
            str(row["tokens"]),
            *(f"{row['us'][name]['p50']:.1f}" for name in names),
            f"{row['speedup']['dense, grouped']:.2f} x",
        )
        for row in rows
    ]
    return markdown(("tokens", *names, "ours, compared with dense"), body)


def _sketching(rows: list[Row]) -> str:
    body = []
    for row in rows:
        times = [sum(row["seconds"][name].values()) for name in ("device", "numba")]
        body.append((row["layer"], *(f"{time:.2f}" for time in times), f"{row['speedup']:.1f} x"))
    return markdown(("layer", "GPU, s", "numba on 16 cores, s", "the GPU is"), body)


def _bars(bars: list[Row]) -> str:
    verdicts = {True: "met", False: "not met", None: "not known"}
    body = [
        (bar["bar"], bar["limit"], f"{bar['figure']:.4g}", verdicts[bar["met"]]) for bar in bars
    ]
    return markdown(("target, worst layer", "target", "figure", ""), body)


def _pair(us: dict[str, dict[str, float]], ours: str, theirs: str) -> str:
    """Return both medians in microseconds, and how many times as fast ours is."""
    first, second = _both(us, ours, theirs, ".1f")
    return f"{first} / {second} ({us[theirs]['p50'] / us[ours]['p50']:.2f} x)"


def _both(us: dict[str, dict[str, float]], ours: str, theirs: str, form: str) -> tuple[str, str]:
    return format(us[ours]["p50"], form), format(us[theirs]["p50"], form)


if __name__ == "__main__":
    sys.exit(main())
