"""Fine-tune one dense model with several methods: sketch tables, LoRA, QLoRA, everything.

All methods see the same examples in the same order, for the same number of steps, with the same
optimizer and schedule. Each method runs with several learning rates, each in a separate process,
and is judged by its best one. Measured are the loss and accuracy on held-out questions, trainable
parameters, peak memory during training, and tokens per second. `methods.py` describes the methods.

The file is written after every run, and runs that it holds are not repeated. So an interrupted
benchmark continues when it is started again.

    pip install -r benchmarks/peers.txt      (for LoRA and QLoRA, and the picture)
    python -m benchmarks.finetune --data FOLDER                 writes results/finetune.json
    python -m benchmarks.finetune --data FOLDER --speed 10      adds: speed, all methods in turn
    python -m benchmarks.finetune --shape 1.3b --output FILE    random weights: memory and speed
    python -m benchmarks.finetune.plot

On the CPU, set OMP_NUM_THREADS to cores that nothing else uses: threads that wait for each other
make a step many times slower.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.shared.dense import SHAPES, dense_folder, digest, model_name
from benchmarks.shared.machine import RESULTS, machine, versions, write_results
from benchmarks.shared.processes import Row, missing, open_document, run_in_process
from spallm_convert.errors import SpallmError
from spallm_formats import sha256

from .data import TEST_FILE, TRAIN_FILE
from .methods import METHODS, PEERS, sketch_folder
from .one_run import Job
from .schedule import key, planned, summarise

RATES = {
    "sketch": (1e-4, 3e-4, 1e-3),
    "affine": (3e-4, 1e-3, 3e-3),
    "lora": (1e-4, 3e-4, 1e-3),
    "full": (1e-5, 3e-5, 1e-4),
}
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "spallm-convert")
_RUN = "benchmarks.finetune.one_run"
_GIGA = 10**9


def run_job(job: Job, scratch: Path) -> Row | None:
    """Run a job in a new process and return its result; None if it failed."""
    return run_in_process(_RUN, asdict(job), scratch)


def missing_peers(methods: Iterable[str]) -> list[str]:
    """Return the packages that the methods need and that are not installed."""
    return missing(peer for name in methods for peer in PEERS.get(METHODS[name].kind, ()))


class Rates(click.ParamType[tuple[float, ...]]):
    """Parse learning rates separated by commas."""

    name = "rates"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            rates = tuple(sorted({float(part) for part in value.split(",")}))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 1e-4,3e-4", param, ctx)
        if rates[0] <= 0:
            self.fail(f"learning rates must be above 0, found {rates[0]:g}", param, ctx)
        return rates


def _echo_row(row: Row) -> None:
    held_out, memory = row.get("held_out", {}), row.get("memory")
    parts = [f"{row['trainable_parameters'] / 1e6:.2f} M trained"]
    if held_out.get("loss") is not None:
        parts.append(
            f"held-out loss {held_out['loss']:.4f}, of options {held_out['option_loss']:.3f}, "
            f"accuracy {100 * held_out['accuracy']:.1f} %"
        )
    if row.get("diverged"):
        parts.append("diverged")
    if memory:
        parts.append(
            f"peak {memory['peak_bytes'] / _GIGA:.2f} GB, {memory['rise_bytes'] / _GIGA:.2f} GB "
            f"above the idle model"
        )
    if "tokens_per_second" in row:
        parts.append(f"{row['tokens_per_second']['p50']:.0f} tokens/s")
    click.echo("    " + "; ".join(parts))


def _echo_speed(speed: Row) -> None:
    for name, row in speed["methods"].items():
        click.echo(
            f"{name:18} {row['tokens_per_second']['p50']:9.0f} tokens/s, "
            f"{row['relative']['p50']:.2f} times {speed['reference']}"
        )


def _header(options: Row, dense: Path) -> Row:
    data: Path | None = options["data"]
    names = ("steps", "batch_size", "seed", "device")
    settings: Row = {
        "model": model_name(options["model"], options["shape"]),
        "model_digest": digest(dense),
    }
    settings |= {name: options[name] for name in names}
    if data is None:
        settings["tokens_per_example"] = options["tokens"]
    else:
        settings |= {name: options[name] for name in ("held_out", "max_length")}
        for name in (TRAIN_FILE, TEST_FILE):
            if (data / name).is_file():
                settings[name] = sha256(data / name)
    about = machine()
    if options["device"] == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    installed = {dist.name for dist in importlib.metadata.distributions()}
    return {
        "benchmark": "finetune",
        "machine": about,
        "versions": versions(*(name for name in _PACKAGES if name in installed)),
        "settings": settings,
    }


def _check(options: Row) -> None:
    if (options["data"] is None) == (options["shape"] is None):
        raise click.UsageError("either --data or --shape is needed, and not both")
    if options["shape"] and options["model"]:
        raise click.UsageError("--shape is a model of random weights: leave --model out")
    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("torch finds no CUDA device")
    if options["shape"] == "1.3b" and options["device"] == "cpu":
        raise click.UsageError("--shape 1.3b needs a CUDA device; --shape tiny runs on the CPU")
    if absent := missing_peers(options["methods"]):
        raise click.UsageError(
            f"not installed: {', '.join(absent)}; pip install -r benchmarks/peers.txt, or name "
            f"methods that do without by --method"
        )


def measure(options: Row, chosen: dict[str, tuple[float, ...]]) -> list[str]:
    """Do the runs that the file lacks; return the titles of the runs that failed."""
    cache, output, data = options["cache"].expanduser(), options["output"], options["data"]
    dense = dense_folder(options["model"], options["shape"], cache)
    header = _header(options, dense)
    document = open_document(output, header, fresh=options["fresh"])
    click.echo("preparing the sketched models")
    sketches = {
        name: str(sketch_folder(METHODS[name], dense, header["settings"]["model_digest"], cache))
        for name in options["methods"]
        if METHODS[name].is_sketched
    }
    names = ("tokens", "steps", "batch_size", "held_out", "max_length", "seed", "device")
    job = Job(
        methods=options["methods"],
        learning_rate=None,
        dense=str(dense),
        sketches=sketches,
        data=None if data is None else str(data),
        **{name: options[name] for name in names},
    )
    with tempfile.TemporaryDirectory() as scratch:
        if not options["speed"]:
            return _carry_out(job, chosen, document, output, Path(scratch))
        speed = run_job(replace(job, steps=options["speed"] + 1, in_turn=True), Path(scratch))
        if speed is None:
            return ["speed"]
        _echo_speed(speed)
        write_results(output, document | {"speed": speed})
        return []


def _carry_out(
    job: Job, chosen: dict[str, tuple[float, ...]], document: Row, output: Path, scratch: Path
) -> list[str]:
    done = {key(row) for row in document["runs"]}
    runs = planned(job.methods, chosen, quality=job.data is not None)
    todo = [run for run in runs if key(run) not in done]
    click.echo(f"{len(todo)} runs to do, {len(runs) - len(todo)} in {output} already")
    failed = []
    for number, run in enumerate(todo, start=1):
        rate = run["learning_rate"]
        title = f"{run['base']} before training" if rate is None else f"{run['method']} {rate:g}"
        click.echo(f"{number} of {len(todo)}: {title}")
        row = run_job(replace(job, methods=(run["method"],), learning_rate=rate), scratch)
        if row is None:
            failed.append(title)
            continue
        document["runs"].append(run | row)
        document["summary"] = summarise(document["runs"])
        write_results(output, document)
        _echo_row(row)
    return failed


_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command(context_settings={"show_default": True})
@click.option("--data", type=_FOLDER, help="Folder with train.json and test.json.")
@click.option("--model", type=_FOLDER, help="Dense model.  [default: the demo's, SmolLM2-135M]")
@click.option(
    "--shape", type=click.Choice(list(SHAPES)), help="Use random weights of this size instead."
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(list(METHODS)),
    default=list(METHODS),
    show_default="all",
)
@click.option("--steps", type=click.IntRange(2), default=100)
@click.option("--batch-size", type=click.IntRange(1), default=8, help="Examples per step.")
@click.option("--held-out", type=click.IntRange(1), default=200, help="Questions from test.json.")
@click.option("--max-length", type=click.IntRange(8), default=512, help="Most tokens per example.")
@click.option(
    "--tokens", type=click.IntRange(2), default=512, help="Tokens per example with --shape."
)
@click.option(
    "--sketch-rates",
    type=Rates(),
    default=RATES["sketch"],
    help="Learning rates of sketch tables, separated by commas.",
)
@click.option(
    "--affine-rates",
    type=Rates(),
    default=RATES["affine"],
    help="Learning rates of the shifts of affine sets, separated by commas.",
)
@click.option(
    "--lora-rates", type=Rates(), default=RATES["lora"], help="Learning rates of LoRA and QLoRA."
)
@click.option("--full-rates", type=Rates(), default=RATES["full"])
@click.option("--seed", type=int, default=0)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default=lambda: "cuda" if torch.cuda.is_available() else "cpu",
    show_default="cuda if available",
)
@click.option(
    "--speed", type=click.IntRange(1), help="Only time the methods in turn, this many rounds."
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("~/.cache/spallm-convert/finetune"),
    help="Folder that keeps dense and sketched models.",
)
@click.option("--fresh", is_flag=True, help="Discard earlier results in the file.")
@click.option(
    "--output",
    type=_FILE,
    default=RESULTS / "finetune.json",
    show_default="benchmarks/results/finetune.json",
)
def main(
    sketch_rates: tuple[float, ...],
    affine_rates: tuple[float, ...],
    lora_rates: tuple[float, ...],
    full_rates: tuple[float, ...],
    **options: Any,
) -> None:
    """Fine-tune one dense model with several methods, and compare them."""
    _check(options)
    chosen = {
        "sketch": sketch_rates,
        "affine": affine_rates,
        "lora": lora_rates,
        "full": full_rates,
    }
    try:
        failed = measure(options, chosen)
    except SpallmError as error:
        raise click.ClickException(str(error)) from error
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}")
    click.echo(f"written to {options['output']}")


if __name__ == "__main__":
    main()
