"""Print the runs of `quality.json` as a Markdown table, by width and perplexity, and a summary.

The summary gives our losses as fractions of LeanQuant's, what other methods do better, and which
types llama.cpp has stored. `--readme` prints the table of README.md instead.

    python -m benchmarks.quality.table [--input FILE] [--readme]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.shared.drawing import PlotError
from benchmarks.shared.machine import RESULTS

from .methods import WIDTHS
from .plot import Row, read

#: Names in sentences of the kinds of calibrated sketches.
OURS = {
    "sketch-calibrated": "the calibrated sketch",
    "sketch-healed": "the healed one",
    "sketch-allocated": "the one with bits by layer",
}
#: Columns of README.md's table, by kind.
README = {
    "sketch-healed": "effort best",
    "sketch-calibrated": "high",
    "sketch-normal": "normal",
    "sketch": "fast",
    "leanquant": "LeanQuant's recipe",
    "guided": "GuidedQuant",
    "autoround": "AutoRound",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "nf4": "NF4",
}
_HEAD = (
    "method",
    "bits per weight",
    "model, MB",
    "perplexity",
    "nats per token above dense",
    "CPU seconds",
    "peak, GB",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--readme", action="store_true")
    given = parser.parse_args()
    try:
        runs = read(given.input)["runs"]
        if given.readme:
            print(readme_table(runs))
            return 0
        found = [*beside_leanquant(runs), better_in_both(runs), *stored_types(runs)]
        print("\n\n".join([table(runs), *found]))
    except PlotError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def table(runs: list[Row]) -> str:
    """Return the table. Runs of the same width are together, the best run first."""
    (dense,) = (row["nats_per_token"] for row in runs if row["kind"] == "dense")
    rows = [_HEAD, ("---", *["---:"] * (len(_HEAD) - 1))]
    for row in sorted(runs, key=lambda row: (-_width(row), row["nats_per_token"])):
        parts = [row, *_continued(row, runs)]  # of a conversion, from the dense model on
        rows.append(
            (
                row["method"],
                f"{row['bits_per_weight']:.2f}",
                f"{row['model_bytes'] / 1e6:.1f}",
                f"{row['perplexity']:.2f}" if row["perplexity"] < 1e4 else "over 10,000",
                f"{row['nats_per_token'] - dense:.3f}",
                f"{sum(part['conversion_cpu_seconds'] for part in parts):.0f}",
                f"{max(part['conversion_peak_bytes'] for part in parts) / 1e9:.2f}",
            )
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def readme_table(runs: list[Row]) -> str:
    """Return perplexities by width. Of a kind that was run with several sizes, the smallest counts.

    The best method of each width is bold.
    """
    kinds = [kind for kind in README if any(row["kind"] == kind for row in runs)]
    rows = [("bits", *(README[kind] for kind in kinds)), ("---:", *["---:"] * len(kinds))]
    for bits in WIDTHS:
        found: dict[str, float] = {}
        for row in sorted(runs, key=lambda row: -row["bits_per_weight"]):
            if row["bits"] == bits:
                found[row["kind"]] = row["perplexity"]  # the last one has the fewest bits
        least = min(found[kind] for kind in kinds if kind in found)
        cells = (_short(found[kind], least) if kind in found else "" for kind in kinds)
        rows.append((str(bits), *cells))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def _short(perplexity: float, least: float) -> str:
    text = f"{perplexity:.1f}" if perplexity < 100 else f"{perplexity:,.0f}"
    text = text if perplexity < 1e4 else "over 10,000"
    return f"**{text}**" if perplexity == least else text


def beside_leanquant(runs: list[Row]) -> list[str]:
    """Return a line per width: the lost perplexity with one table per row."""
    (dense,) = (row["perplexity"] for row in runs if row["kind"] == "dense")
    losses = {
        (row["kind"], row["bits"]): row["perplexity"] - dense
        for row in runs
        if row["groups_per_row"] == 1
    }
    lines = []
    for bits in WIDTHS:
        theirs = losses.get(("leanquant", bits))
        if theirs is None:
            continue
        line = f"At {bits} bits LeanQuant's recipe loses {theirs:.2f} of perplexity"
        for kind, name in OURS.items():
            if (loss := losses.get((kind, bits))) is not None and kind != "sketch-allocated":
                line += f", {name} {loss:.2f} ({loss / theirs:.0%} of that)"
        lines.append(line + ".")
    return lines


def better_in_both(runs: list[Row]) -> str:
    """Name other methods with fewer bits and a lower perplexity than a calibrated sketch."""
    axes = ("bits_per_weight", "perplexity")
    others = [row for row in runs if not row["kind"].startswith(("sketch", "hash", "dense"))]
    found = [
        f"{other['method']} than {ours['method']}"
        for ours in runs
        for other in others
        if ours["kind"] in OURS and all(other[axis] <= ours[axis] for axis in axes)
    ]
    names = "; ".join(found) or "none"
    return (
        f"Methods of others with fewer bits and less perplexity than a sketch for a text: {names}."
    )


def stored_types(runs: list[Row]) -> list[str]:
    """Return a line per run of llama.cpp: the types of its layers, by their shares of weights."""
    lines = []
    for row in runs:
        if types := row.get("stored_types"):
            whole = sum(types.values())
            shares = ", ".join(f"{size / whole:.0%} {name}" for name, size in types.items())
            lines.append(f"{row['method']} stores its weights as {shares}.")
    return lines


def _width(row: Row) -> int:
    """Return the bits of a code. For llama.cpp it is the width nearest to what is stored.

    llama.cpp may store most layers in wider types than the one that its mixture is named after.
    """
    if row.get("stored_types") is None:
        return int(row["bits"])
    return min(WIDTHS, key=lambda bits: abs(bits - row["bits_per_weight"]))


def _continued(row: Row, runs: list[Row]) -> list[Row]:
    """Return the run that this run continued, if any. Raise PlotError if its row is missing."""
    kind = row.get("continues")
    if kind is None:
        return []
    alike = {"kind": kind} | {key: row[key] for key in ("bits", "groups_per_row")}
    found = [other for other in runs if all(other[key] == alike[key] for key in alike)]
    if not found:
        raise PlotError(f"{row['method']} continues a run of {kind} that is not in the file")
    return found


if __name__ == "__main__":
    sys.exit(main())
