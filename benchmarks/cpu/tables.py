"""Print the figures of results files as the Markdown tables that docs/performance.md shows.

A test compares the page with these tables, so the page holds no figure that was not measured.

    python -m benchmarks.cpu.tables [linear] [amx] [generate] [training] [tenants] [affine]
    python -m benchmarks.cpu.tables --write        replaces the tables on the page
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import click

from benchmarks.shared.drawing import DOCS
from benchmarks.shared.machine import RESULTS
from benchmarks.shared.markdown import markdown

from .bars import bars_table
from .tenants import LAYER, LOOP, MIXED, ONE, READ, slower
from .turns import Row, ratio

Document = dict[str, Any]
PAGE = DOCS / "performance.md"
_DTYPES = ("float32", "bfloat16")


def linear_tables(document: Document) -> list[str]:
    """Return products, units, widths, gradients, both paths, and bars."""
    fastest = document["units"][0]
    return [
        _products(fastest),
        _units(document["units"]),
        _widths(fastest),
        _gradients(fastest),
        _paths(document["units"]),
        bars_table("the layer", document["bars"]),
    ]


def amx_tables(document: Document) -> list[str]:
    """Return products with AMX, where either path is used, and bars."""
    fastest = document["units"][0]
    return [
        _products(fastest, "with AMX, tokens"),
        _paths(document["units"], "with AMX, decode is faster"),
        bars_table("with AMX", document["bars"]),
    ]


def generate_tables(document: Document) -> list[str]:
    """Return speeds, the parts of a step, and bars."""
    speeds = document["medians"]
    dense = speeds["dense float32"]
    body = []
    for name, speed in speeds.items():
        of_turns = document["speeds"][name]["tokens_per_second"]
        times = f"{min(of_turns):.1f} to {max(of_turns):.1f}"
        body.append((name, f"{speed:.1f}", times, f"{speed / dense:.2f} x"))
    parts = document["step_milliseconds"]
    names = list(next(iter(parts.values())))
    split = [(model, *(f"{found[name]:.2f}" for name in names)) for model, found in parts.items()]
    head = ("generating", "tokens/s", "turns", "compared with dense float32")
    return [
        markdown(head, body),
        markdown(("a step, ms", *names), split),
        bars_table("generating", document["bars"]),
    ]


def training_tables(document: Document) -> list[str]:
    """Return the steps of all methods, and bars."""
    body = [
        (
            name,
            str(row["tokens"]),
            f"{found['trainable_parameters'] / 1e6:.2f} M",
            f"{found['seconds_per_step']['p50']:.2f}",
            f"{found['relative']['p50']:.2f} x",
            f"{found['memory']['peak_bytes'] / 1e9:.2f}",
            f"{found['memory']['rise_bytes'] / 1e9:.2f}",
        )
        for row in document["results"]
        for name, found in row["methods"].items()
    ]
    head = (
        *("training", "tokens per example", "trained", "s per step", "speed, QLoRA's = 1"),
        *("peak, GB", "above the idle model, GB"),
    )
    return [markdown(head, body), bars_table("training", document["bars"])]


def tenants_tables(document: Document) -> list[str]:
    """Return products of tokens of one set and of several, and bars."""
    names = (LAYER, ONE, MIXED, LOOP, READ)
    body = [
        (
            f"{row['bits']} bits, {row['groups_per_row']} groups, {row['inputs']}",
            *(_ms(row, name) for name in names),
            f"{slower(row):.2f} x",
        )
        for row in document["rows"]
    ]
    head = ("16 tokens, ms", *names, "16 sets without reading, compared with one")
    return [markdown(head, body), bars_table("tenants", document["bars"])]


def affine_tables(document: Document) -> list[str]:
    """Return products of tokens of the base, of affine sets and of full tables, and bars."""
    groups = document["groups_per_row"]
    body = []
    for name in next(iter(groups.values())):
        cells = [
            (f"{row[name]['milliseconds']['p50']:.2f}", f"{row[name]['relative']['p50']:.2f} x")
            for row in groups.values()
        ]
        body.append((name, *(cell for pair in cells for cell in pair)))
    columns = ((f"{number} groups, ms", "compared with the base") for number in groups)
    head = ("affine sets", *(cell for pair in columns for cell in pair))
    return [markdown(head, body), bars_table("affine sets", document["bars"])]


#: Tables by benchmark, with the results file that they show.
TABLES: dict[str, tuple[str, Callable[[Document], list[str]]]] = {
    "linear": ("linear.json", linear_tables),
    "amx": ("linear_amx.json", amx_tables),
    "generate": ("generate.json", generate_tables),
    "training": ("training_cpu.json", training_tables),
    "tenants": ("tenants.json", tenants_tables),
    "affine": ("affine.json", affine_tables),
}


def _products(unit: Row, title: str = "products, tokens") -> str:
    body = []
    for row in _rows(unit, "products"):
        cells = [str(row["tokens"])]
        for dtype in _DTYPES:
            dense, ours = f"dense {dtype}", f"sketch {dtype}"
            cells += [_ms(row, dense), _ms(row, ours), f"{ratio(row, dense, ours):.2f} x"]
        cells.append(f"{ratio(row, 'dense float32', 'sketch bfloat16'):.2f} x")
        body.append(tuple(cells))
    head = [title]
    for dtype in _DTYPES:
        head += [f"dense {dtype}, ms", "sketch, ms", "faster"]
    return markdown([*head, "sketch bfloat16, dense float32"], body)


def _units(units: list[Row]) -> str:
    """Return what each unit takes in float32, and the dense layer in its process."""
    body = []
    for rows in zip(*(_rows(unit, "products") for unit in units), strict=True):
        body.append((f"{rows[0]['tokens']} tokens", *(_ms(row, "sketch float32") for row in rows)))
    for dtype in _DTYPES:
        found = (_rows(unit, "dequantize")[0] for unit in units)
        body.append((f"dequantize to {dtype}", *(_ms(row, f"to {dtype}") for row in found)))
    return markdown(("float32, ms", *(unit["unit"] for unit in units)), body)


def _widths(unit: Row) -> str:
    (row,) = _rows(unit, "widths")
    widths = dict.fromkeys(name.partition(",")[0] for name in row["milliseconds"])
    body = [(dtype, *(_ms(row, f"{bits}, {dtype}") for bits in widths)) for dtype in _DTYPES]
    return markdown(("1 token, ms", *widths), body)


def _gradients(unit: Row) -> str:
    body = []
    for row in _rows(unit, "gradients"):
        cells = [f"{row['inputs']}, {row['tokens']} tokens"]
        for dense, ours in (("weight", "tables"), ("inputs", "inputs")):
            slower = ratio(row, f"sketch, {ours}", f"dense, {dense}")
            cells += [_ms(row, f"dense, {dense}"), _ms(row, f"sketch, {ours}"), f"{slower:.2f}"]
        body.append(tuple(cells))
    head = ("gradients", "dense weight, ms", "tables, ms", "ratio")
    return markdown((*head, "inputs, dense, ms", "inputs, sketch, ms", "ratio"), body)


def _paths(units: Iterable[Row], title: str = "decode is faster, by tokens") -> str:
    """Return the dense path's time over the decode path's: above 1, decode is the faster path."""
    body, counts = [], []
    for unit in units:
        found: dict[str, list[Row]] = {}
        for row in _rows(unit, "paths"):
            codes = "hashed" if row["hashed"] else "stored"
            found.setdefault(f"{unit['unit']}, {row['inputs']}, {codes} codes", []).append(row)
        for name, rows in found.items():
            body.append((name, *(f"{ratio(row, 'dense', 'decode'):.2f} x" for row in rows)))
            counts = [str(row["tokens"]) for row in rows]
    return markdown((title, *counts), body)


def _rows(unit: Row, section: str) -> list[Row]:
    return [row for row in unit["rows"] if row["section"] == section]


def _ms(row: Row, name: str) -> str:
    return f"{row['milliseconds'][name]['p50']:.2f}"


def replaced(page: str, table: str) -> str:
    """Return the page with a table in the place of the one with the same first column.

    Raises:
        ValueError: If the page does not have exactly one such table.
    """
    first_cell = table[: table.index("|", 1) + 1]
    blocks = page.split("\n\n")
    found = [number for number, block in enumerate(blocks) if block.startswith(first_cell)]
    if len(found) != 1:
        raise ValueError(f"the page has {len(found)} tables that begin with {first_cell!r}")
    blocks[found[0]] = table
    return "\n\n".join(blocks)


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(TABLES)))
@click.option("--write", is_flag=True, help="Replace the tables on the page.")
def main(names: tuple[str, ...], write: bool) -> None:
    """Print the tables of docs/performance.md, or replace them."""
    page = PAGE.read_text()
    for name in names or TABLES:
        file, tables = TABLES[name]
        for table in tables(json.loads((RESULTS / file).read_text())):
            click.echo(table + "\n")
            page = replaced(page, table) if write else page
    if write:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
