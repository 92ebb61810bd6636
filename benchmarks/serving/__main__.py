"""Compare how fast vLLM serves a sketched model with a dense one, and many tenants with one.

SmolLM2-135M on the CPU, in bfloat16. Measured is decoding: the time of many tokens less the time of
a few, so that the prompt does not count. Each engine has a process of its own, and engines take
turns. With sets of tables, 16 requests have one set or 16 sets; reading the tables of 16 sets, and
nothing else, is measured beside them.

vLLM lives in an environment of its own, in which this runs (see `make test-vllm`):

    python -m benchmarks.serving --model FOLDER      writes benchmarks/results/serving.json
    python -m benchmarks.serving.table               prints the tables of docs/serving.md

FOLDER holds the dense model. On a processor with AMX, `--output` names the other file of the page,
benchmarks/results/serving_amx.json.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from benchmarks.cpu.bars import judged
from benchmarks.shared.machine import RESULTS, Load, cores, machine, versions, write_results
from benchmarks.shared.processes import run_in_process
from spallm_convert import SketchConfig, convert, load_sketched, save_tables
from spallm_convert.serving.versions import vllm_version

from .one_run import Job

Row = dict[str, Any]
_BATCHES = (1, 8)
_TENANTS = 16
_RUN = "benchmarks.serving.one_run"


def save_sets(sketched: Path, folder: Path) -> list[str]:
    """Save as many sets of changed tables as there are tenants; return their folders."""
    model = load_sketched(sketched, dtype=torch.bfloat16)
    found = []
    for number in range(_TENANTS):
        with torch.no_grad():
            for name, table in model.named_parameters():
                if name.endswith("_table"):
                    table.mul_(1 + 0.001 * (number + 1))
        found.append(str(save_tables(model, folder / f"set-{number}")))
    return found


def jobs(dense: Path, sketched: Path, sets: list[str]) -> dict[str, Job]:
    """Return what is measured, by name."""
    found = {}
    for batch in _BATCHES:
        for name, model in (("dense", dense), ("sketch", sketched)):
            found[f"{name}, batch {batch}"] = Job(model=str(model), batch=batch)
    for count in (1, _TENANTS):
        names = sets[:count] * (_TENANTS // count)
        found[f"sketch, {_TENANTS} requests of {count} sets"] = Job(
            model=str(sketched), batch=_TENANTS, sets=names
        )
    return found


def judge(rows: dict[str, Row]) -> list[Row]:
    """Return the bars."""
    speed = {name: median(row["tokens_per_second"]) for name, row in rows.items()}
    bars = [
        judged(
            f"tokens/s of the sketch over the dense model's, batch {batch}",
            ">=",
            1.0,
            speed[f"sketch, batch {batch}"] / speed[f"dense, batch {batch}"],
        )
        for batch in _BATCHES
    ]
    many, one = (rows[f"sketch, {_TENANTS} requests of {n} sets"] for n in (_TENANTS, 1))
    step = {
        key: _TENANTS / median(row["tokens_per_second"])
        for key, row in (("many", many), ("one", one))
    }
    reading = median(many["seconds_to_read"])
    bars.append(
        judged(
            f"a step of {_TENANTS} sets, without reading the tables, over a step of one set",
            "<=",
            1.5,
            (step["many"] - reading) / step["one"],
        )
    )
    return bars


@click.command(help=__doc__.partition("\n")[0] if __doc__ else None)
@click.option(
    "--model",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the dense model.",
)
@click.option("--turns", default=5, show_default=True, type=click.IntRange(1))
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(8), help="Decoded.")
@click.option(
    "--output", default=RESULTS / "serving.json", show_default=True, type=click.Path(path_type=Path)
)
def main(model: Path, turns: int, tokens: int, output: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        convert(model, folder / "sketched", SketchConfig(effort="fast"))
        wanted = jobs(model, folder / "sketched", save_sets(folder / "sketched", folder))
        rows: dict[str, Row] = {
            name: {"tokens_per_second": [], "seconds_to_read": [], "elsewhere": []}
            for name in wanted
        }
        for turn in range(1, turns + 1):
            for name, job in wanted.items():
                load = Load()
                found = run_in_process(_RUN, asdict(job) | {"tokens": tokens}, folder)
                if found is None:
                    raise click.ClickException(f"{name} failed")
                for key, value in found.items():
                    rows[name][key].append(value)
                rows[name]["elsewhere"].append(load.elsewhere())
                click.echo(f"turn {turn}: {name:36}{found['tokens_per_second']:8.1f} tokens/s")
            settings = {"turns": turn, "tokens": tokens, "threads": cores(), "dtype": "bfloat16"}
            write_results(output, describe(settings, rows))  # a turn takes minutes


def describe(settings: Row, rows: dict[str, Row]) -> Row:
    """Return what the results file holds."""
    return {
        "benchmark": "serving",
        "settings": settings,
        "machine": machine(),
        "versions": versions("torch", "transformers", "numba", "spallm-convert")
        | {"vllm": vllm_version()},
        "rows": rows,
        "bars": judge(rows),
    }


if __name__ == "__main__":
    main()
