"""Compare a calibrated conversion with one that computes with scikit-learn and Python loops.

Both do every step of ours, in the same order and equally often: read the model, run the text
through its blocks, cluster every row, then compensate, solve for tables and descend in turn. They
differ in the numerics. Ours is exact k-means and compiled loops over rows. The other's k-means is
scikit-learn's, called as LeanQuant does (arXiv 2407.10032); its compensation and descent are loops
over columns in torch, all rows of a layer at once, as in GPTQ's published code. Matrix products and
the text's way through the blocks are torch's in both.

Only the first blocks of a model are converted, because all blocks are alike. Conversions take
turns; our first one compiles and is not timed. Both use all cores: scikit-learn runs a process on
each. At the end, ours converts the whole model once, with the first of the widths.

    python -m benchmarks.cpu.calibrated_model        writes benchmarks/results/calibrated_model.json
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch

from benchmarks.shared.dense import dense_folder, model_name
from benchmarks.shared.machine import RESULTS, machine, versions, write_results
from spallm_convert import CalibrationConfig, SketchConfig, convert
from spallm_convert.calibration import layers
from spallm_convert.cli.terminal import quiet_libraries
from spallm_kernels import batched
from spallm_kernels.batched import calibrated

from .clustering import Singles, Workers, fit_row, started_workers

_PACKAGES = ("numpy", "numba", "torch", "transformers", "scikit-learn", "spallm-convert")


def cut_model(dense: Path, blocks: int, folder: Path) -> None:
    """Write a model of the first blocks of another, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # the other blocks are not missed
    model: Any = AutoModelForCausalLM.from_pretrained(dense, num_hidden_layers=blocks)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder)


def cluster_by_scikit_learn(workers: Workers) -> Any:
    """Return a function with the arguments and results of `spallm_kernels.kmeans`."""

    def kmeans(
        weights: Singles, importance: Singles, groups: int, entries: int
    ) -> tuple[Singles, None]:
        of_group = np.split(np.broadcast_to(importance, (1, weights.shape[1]))[0], groups)
        tasks = (
            (part[:, None], of_group[group], entries)
            for row in weights
            for group, part in enumerate(np.split(row, groups))
        )
        found = np.sort(np.stack(list(workers.processes.imap(fit_row, tasks, 16))), axis=1)
        return found.reshape(len(weights), groups, entries), None

    return kmeans


def convert_by_loops(model: Path, output: Path, config: SketchConfig, workers: Workers) -> Any:
    """Run `convert` with loops over columns in torch and scikit-learn's k-means."""
    with (
        mock.patch.object(layers, "choose_numerics", return_value=batched),
        mock.patch.object(calibrated, "kmeans", cluster_by_scikit_learn(workers)),
    ):
        return convert(model, output, config, device="cpu")


def measure(model: Path, config: SketchConfig, repeats: int, scratch: Path) -> dict[str, Any]:
    """Return seconds of both, turn by turn, and the relative errors of their layers' outputs."""
    seconds: dict[str, list[float]] = {"ours": [], "loops": []}
    errors: dict[str, float] = {}
    with started_workers() as workers:
        contenders: dict[str, Any] = {
            "ours": lambda folder: convert(model, folder, config, device="cpu"),
            "loops": lambda folder: convert_by_loops(model, folder, config, workers),
        }
        contenders["ours"](scratch / "first")
        for turn in range(repeats):
            for name, run in contenders.items():
                start = time.perf_counter()
                report = run(scratch / f"{name}-{turn}")
                seconds[name].append(time.perf_counter() - start)
                errors[name] = report.totals["relative_output_error"]
                click.echo(f"  {name:6}{seconds[name][-1]:9.1f} s")
    for folder in scratch.iterdir():
        shutil.rmtree(folder)
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    return {
        "bits": config.bits,
        "seconds": seconds,
        "times_faster": float(np.median(ratios)),
        "relative_output_error": errors,
    }


@click.command(context_settings={"show_default": True})
@click.option("--bits", multiple=True, type=click.IntRange(2, 4), default=(4, 3, 2))
@click.option("--groups-per-row", type=click.IntRange(min=1), default=1, help="Tables per row.")
@click.option("--blocks", type=click.IntRange(min=1), default=3, help="Blocks to compare.")
@click.option(
    "--samples", type=click.IntRange(min=1), default=32, help="Samples of the built-in text."
)
@click.option("--seqlen", type=click.IntRange(min=2), default=512, help="Tokens per sample.")
@click.option("--repeats", type=click.IntRange(min=1), default=1, help="Timed turns.")
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of a dense model.  [default: the installed SmolLM2-135M-Instruct]",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=Path("~/.cache/spallm-convert/quality"),
    help="Folder that keeps the installed model, dequantized.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=RESULTS / "calibrated_model.json",
    show_default="benchmarks/results/calibrated_model.json",
)
def main(
    bits: tuple[int, ...],
    groups_per_row: int,
    blocks: int,
    samples: int,
    seqlen: int,
    repeats: int,
    model: Path | None,
    cache: Path,
    output: Path,
) -> None:
    """Compare a calibrated conversion with one by scikit-learn and loops over columns."""
    quiet_libraries()
    dense = dense_folder(model, None, cache.expanduser())
    results = []
    with tempfile.TemporaryDirectory() as folder:
        short, scratch = Path(folder, "model"), Path(folder, "outputs")
        scratch.mkdir()
        cut_model(dense, blocks, short)
        configs = [
            SketchConfig(
                bits=width,
                groups_per_row=groups_per_row,
                calibration=CalibrationConfig(samples=samples, seqlen=seqlen),
            )
            for width in bits
        ]
        for config in configs:
            click.echo(f"{config.bits} bits")
            results.append(measure(short, config, repeats, scratch))
            click.echo(f"  {results[-1]['times_faster']:.1f} times faster")
        start = time.perf_counter()
        convert(dense, scratch / "whole", configs[0], device="cpu")
        whole = time.perf_counter() - start
        click.echo(f"the whole model to {bits[0]} bits: {whole:.0f} s")
    document = {
        "benchmark": "calibrated_model",
        "machine": machine(),
        "versions": versions(*_PACKAGES),
        "settings": {
            "model": model_name(model),
            "blocks": blocks,
            "groups_per_row": groups_per_row,
            "samples": samples,
            "seqlen": seqlen,
            "repeats": repeats,
            "threads": torch.get_num_threads(),
        },
        "results": results,
        "whole_model": {"bits": bits[0], "seconds": whole},
    }
    write_results(output, document)
    click.echo(f"written to {output}")


if __name__ == "__main__":
    main()
