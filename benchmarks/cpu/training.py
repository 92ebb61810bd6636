"""Compare a training step of sketch tables on the CPU with a step of QLoRA and of LoRA.

SmolLM2-135M, as in `benchmarks.finetune`: the tables of a sketch with 4 bits and 4 groups, and
adapters with at most as many parameters on an NF4 model (bitsandbytes) and on the dense model. A
step is a forward and a backward pass of 8 examples under bfloat16 autocast, and AdamW. Examples are
random tokens of one length: 64, about as long as the questions of `benchmarks.finetune`, and 512,
its limit.

Methods take turns in one process. Then each method does a few steps in a process of its own, so
that the peak of its memory is known.

    pip install -r benchmarks/peers.txt
    python -m benchmarks.cpu.training          writes benchmarks/results/training_cpu.json
    python -m benchmarks.cpu.tables            prints the tables of docs/performance.md
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from benchmarks.finetune.__main__ import missing_peers
from benchmarks.finetune.methods import MATCHED, METHODS, sketch_folder
from benchmarks.finetune.one_run import Job
from benchmarks.shared.dense import dense_folder, digest, model_name
from benchmarks.shared.machine import RESULTS, Load, machine, versions, write_results
from benchmarks.shared.processes import run_in_process
from spallm_convert.cli.terminal import quiet_libraries
from spallm_kernels.cpu.vector_units import PORTABLE, host_unit

from .bars import bars_table, judged
from .turns import Row

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "numba", "spallm-convert")
_RUN = "benchmarks.finetune.one_run"
#: Speeds are relative to the first.
COMPARED = ("qlora-matched", MATCHED, "lora-matched")
_STEPS_FOR_MEMORY = 3
_RATE = 1e-6  # what is learned does not matter


def measure(job: Job, scratch: Path) -> Row:
    """Return the seconds of steps in turn, and the memory of each method."""
    load = Load()
    speed = _run(replace(job, in_turn=True), scratch)
    elsewhere = load.elsewhere()
    found: dict[str, Row] = {}
    for name in job.methods:
        alone = replace(job, methods=(name,), learning_rate=_RATE, steps=_STEPS_FOR_MEMORY)
        row = _run(alone, scratch)
        timed = speed["methods"][name]
        found[name] = {
            "seconds_per_step": timed["seconds_per_step"],
            "relative": timed["relative"],
            "trainable_parameters": row["trainable_parameters"],
            "rank": row.get("rank"),
            "model_bytes": row["model_bytes"],
            "memory": row["memory"],
        }
        click.echo(
            f"  {name:18}{timed['seconds_per_step']['p50']:8.2f} s a step, "
            f"{timed['relative']['p50']:.2f} times as fast as {COMPARED[0]}, "
            f"peak {row['memory']['peak_bytes'] / 1e9:.2f} GB"
        )
    return {
        "tokens": job.tokens,
        "methods": found,
        "threads": speed["threads"],
        "elsewhere": elsewhere,
    }


def judge(results: list[Row]) -> list[Row]:
    """Return the bars."""
    return [
        judged(
            f"QLoRA's time per step over ours, {row['tokens']} tokens per example",
            ">=",
            1.0,
            row["methods"][MATCHED]["relative"]["p50"],
        )
        for row in results
    ]


def _run(job: Job, scratch: Path) -> Row:
    found = run_in_process(_RUN, asdict(job), scratch)
    if found is None:
        raise click.ClickException(f"training {', '.join(job.methods)} failed")
    return found


@click.command(context_settings={"show_default": True})
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    multiple=True,
    default=(64, 512),
    help="Tokens of an example.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, help="Examples per step.")
@click.option("--turns", type=click.IntRange(min=1), default=5, help="Timed steps of a method.")
@click.option(
    "--method",
    "methods",
    type=click.Choice(list(METHODS)),
    multiple=True,
    default=COMPARED,
    hidden=True,
    help="Methods to compare; the first is what speeds are relative to.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of a dense model.  [default: the installed SmolLM2-135M-Instruct]",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=Path("~/.cache/spallm-convert/finetune"),
    help="Folder that keeps dense and sketched models.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=RESULTS / "training_cpu.json",
    show_default="benchmarks/results/training_cpu.json",
)
def main(
    tokens: tuple[int, ...],
    batch_size: int,
    turns: int,
    methods: tuple[str, ...],
    model: Path | None,
    cache: Path,
    output: Path,
) -> None:
    """Compare a training step of sketch tables with a step of QLoRA and of LoRA."""
    quiet_libraries()
    if absent := missing_peers(methods):
        raise click.UsageError(
            f"not installed: {', '.join(absent)}; pip install -r benchmarks/peers.txt"
        )
    cache = cache.expanduser()
    dense = dense_folder(model, None, cache)
    identity = digest(dense)
    job = Job(
        methods=methods,
        learning_rate=None,
        dense=str(dense),
        sketches={
            name: str(sketch_folder(METHODS[name], dense, identity, cache))
            for name in methods
            if METHODS[name].kind == "sketch"
        },
        data=None,
        tokens=0,
        steps=turns + 1,  # the first step is not counted
        batch_size=batch_size,
        held_out=0,
        max_length=max(tokens),
        seed=0,
        device="cpu",
    )
    unit = host_unit()
    document: dict[str, Any] = {
        "benchmark": "training_cpu",
        "machine": machine(),
        "versions": versions(*_PACKAGES),
        "settings": {
            "model": model_name(model),
            "model_digest": identity,
            "batch_size": batch_size,
            "turns": turns,
            "unit": PORTABLE if unit is None else unit.name,
        },
        "results": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        for count in tokens:
            click.echo(f"{count} tokens per example")
            document["results"].append(measure(replace(job, tokens=count), Path(scratch)))
            document["bars"] = judge(document["results"])
            write_results(output, document)
    click.echo(f"{bars_table('training', document['bars'])}\nwritten to {output}")


if __name__ == "__main__":
    main()
