"""Compare the time and memory of a conversion with effort normal with those of effort fast.

Two models: the installed SmolLM2-135M-Instruct, and a Llama of 1.0 billion random weights in its
blocks with the same tokenizer. Conversions take turns, each in a process of its own, so that the
peak of its memory is known. A first conversion of the small model compiles and is not counted.

    python -m benchmarks.cpu.efforts        writes benchmarks/results/efforts.json
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.shared.dense import LlamaShape, dense_folder, model_name, write_checkpoint
from benchmarks.shared.machine import RESULTS, machine, resident, versions, write_results
from benchmarks.shared.processes import run_in_process
from spallm_convert.effort import FAST, NORMAL

_PACKAGES = ("numpy", "numba", "torch", "transformers", "spallm-convert")
_RUN = "benchmarks.cpu.efforts"
_RANDOM = "random-1b"


def random_model(cache: Path, tokenizer: Path) -> Path:
    """Return the folder of a Llama of random weights with a tokenizer, made if it is missing."""
    folder = cache / _RANDOM
    done = cache / f"{_RANDOM}.complete"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
        write_checkpoint(folder, LlamaShape(16, vocabulary=49152))
        for file in tokenizer.glob("*token*"):
            shutil.copy(file, folder)
        done.touch()
    return folder


def one_conversion(model: str, effort: str) -> dict[str, Any]:
    """Convert a model; return seconds, bytes of peak memory and relative errors."""
    from spallm_convert import SketchConfig, convert

    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        report = convert(model, Path(scratch, "out"), SketchConfig(effort=effort), device="cpu")
        seconds = time.perf_counter() - start
    if "not_calibrated" in report.document:
        raise RuntimeError(report.document["not_calibrated"])
    return {
        "seconds": seconds,
        "peak_bytes": resident("VmHWM"),
        "sketched_weights": report.totals["sketched_weights"],
    }


def compare(model: Path, repeats: int, scratch: Path) -> dict[str, Any]:
    """Return seconds of both efforts, turn by turn, and the median of their ratios."""
    runs: dict[str, list[dict[str, Any]]] = {FAST: [], NORMAL: []}
    for _ in range(repeats):
        for effort, found in runs.items():
            row = run_in_process(_RUN, {"model": str(model), "effort": effort}, scratch)
            if row is None:
                raise click.ClickException(f"the conversion of {model} with effort {effort} failed")
            click.echo(f"  {effort:7}{row['seconds']:8.1f} s, {row['peak_bytes'] / 1e9:.2f} GB")
            found.append(row)
    pairs = zip(runs[FAST], runs[NORMAL], strict=True)
    return {
        "sketched_weights": runs[FAST][0]["sketched_weights"],
        "seconds": {effort: [run["seconds"] for run in found] for effort, found in runs.items()},
        "peak_bytes": {
            effort: max(run["peak_bytes"] for run in found) for effort, found in runs.items()
        },
        "normal_per_fast": median(slow["seconds"] / fast["seconds"] for fast, slow in pairs),
    }


@click.command(context_settings={"show_default": True})
@click.option("--repeats", type=click.IntRange(min=1), default=3, help="Timed turns.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=Path("~/.cache/spallm-convert/quality"),
    help="Folder that keeps both dense models.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=RESULTS / "efforts.json",
    show_default="benchmarks/results/efforts.json",
)
def main(repeats: int, cache: Path, output: Path) -> None:
    """Compare the efforts normal and fast."""
    dense = dense_folder(None, None, cache.expanduser())
    models = {model_name(None): dense, _RANDOM: random_model(cache.expanduser(), dense)}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        run_in_process(_RUN, {"model": str(dense), "effort": NORMAL}, Path(folder))
        for name, model in models.items():
            click.echo(name)
            results[name] = compare(model, repeats, Path(folder))
            click.echo(f"  normal takes {results[name]['normal_per_fast']:.1f} times as long")
    header = {"benchmark": "efforts", "machine": machine(), "versions": versions(*_PACKAGES)}
    write_results(output, header | {"repeats": repeats, "results": results})
    click.echo(f"written to {output}")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith("job.json"):  # as `run_in_process` starts it
        job, result = map(Path, sys.argv[1:])
        write_results(result, one_conversion(**json.loads(job.read_text())))
    else:
        main()
