"""Compare the quality that sketching and other post-training quantization leave of a dense model.

All methods quantize the same layers of the same model. Methods that need text get the same tokens.
All are measured alike: the weights of a method are put into the dense model in float32, and
perplexity is measured on text that no method has seen. Also reported is what the method stores per
weight, in bits: codes, tables, scales, zeros and padding. `methods.py` lists the methods.

Every run is a separate process. The file is written after every run, and runs that it holds are not
repeated. So an interrupted benchmark continues when it is started again.

    pip install -r benchmarks/quality_peers.txt     (for the peers, and the picture)
    export LLAMA_CPP=FOLDER                         (for llama.cpp, built as `llamacpp.py` says)
    python -m benchmarks.quality --text FILE        writes results/quality.json
    python -m benchmarks.quality.table              prints a table
    python -m benchmarks.quality.plot               draws docs/quality.svg

Set OMP_NUM_THREADS and NUMBA_NUM_THREADS to cores that nothing else uses.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import spallm_convert
import spallm_formats
import spallm_kernels
from benchmarks.shared.dense import dense_folder, digest, model_name
from benchmarks.shared.machine import RESULTS, machine, versions, write_results
from benchmarks.shared.processes import Row, missing, open_document, run_in_process
from spallm_convert.errors import OptionError, SpallmError
from spallm_formats import sha256

from . import llamacpp
from .methods import METHODS, PEERS
from .one_run import Job, halves

_PACKAGES = ("torch", "transformers", "numpy", "numba", "spallm-convert")
_RUN = "benchmarks.quality.one_run"
_SETTINGS = ("samples", "seqlen", "eval_tokens", "window", "seed")


def run_job(job: Job, scratch: Path) -> Row | None:
    """Run a job in a new process and return its row; None if it failed."""
    return run_in_process(_RUN, asdict(job), scratch)


def missing_peers(methods: Iterable[str]) -> list[str]:
    """Return the packages and programs that the methods need and that are not installed."""
    kinds = {METHODS[name].kind for name in methods}
    programs = llamacpp.missing_programs() if "llamacpp" in kinds else []
    return missing(peer for kind in kinds for peer in PEERS.get(kind, ())) + programs


def check_text(path: Path, dense: Path, eval_tokens: int) -> None:
    """Raise OptionError if the second half of the text, which is measured on, is too short."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(dense)
    _, held_out = halves(path.read_text(encoding="utf-8"))
    found = len(tokenizer(held_out, verbose=False)["input_ids"])
    if found < eval_tokens:
        raise OptionError(
            f"{path} is too short: its second half has {found:,} tokens, {eval_tokens:,} are to be "
            f"measured on"
        )


def _header(options: Row, dense: Path) -> Row:
    settings = {
        "model": model_name(options["model"]),
        "model_digest": digest(dense),
        "text": options["text"].name,
        "text_sha256": sha256(options["text"]),
    }
    installed = {dist.name for dist in importlib.metadata.distributions()}
    return {
        "benchmark": "quality",
        "machine": machine(),
        "versions": versions(*(name for name in _PACKAGES if name in installed)),
        "settings": settings | {name: options[name] for name in _SETTINGS},
    }


def _identity(document: Row) -> str:
    """Identify results that another run may use: settings, versions and sources must be equal."""
    sources = {
        f"{package.__name__}/{path.relative_to(folder)}": sha256(path)
        for package in (spallm_convert, spallm_formats, spallm_kernels)
        for folder in map(Path, package.__path__)
        for path in folder.rglob("*.py")
    }
    same = json.dumps([document["settings"], document["versions"], sources], sort_keys=True)
    return hashlib.sha256(same.encode()).hexdigest()[:16]


def _echo_row(row: Row) -> None:
    click.echo(
        f"    {row['bits_per_weight']:.3f} bits per weight, perplexity {row['perplexity']:.3f}, "
        f"{row['conversion_seconds']:.0f} s, peak {row['conversion_peak_bytes'] / 1e9:.2f} GB"
    )


def carry_out(options: Row) -> list[str]:
    """Do the runs that the file lacks; return the methods that failed."""
    output, text, cache = options["output"], options["text"], options["cache"].expanduser()
    dense = dense_folder(options["model"], None, cache)
    check_text(text, dense, options["eval_tokens"])
    document = open_document(output, _header(options, dense), fresh=options["fresh"])
    done = {row["method"] for row in document["runs"]}
    todo = [name for name in dict.fromkeys(options["methods"]) if name not in done]
    click.echo(f"{len(todo)} runs to do, {len(done)} in {output} already")
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(todo, start=1):
            click.echo(f"{number} of {len(todo)}: {name}")
            settings = {setting: options[setting] for setting in _SETTINGS}
            job = Job(
                method=name,
                dense=str(dense),
                text=str(text),
                kept=str(cache / "calibrated" / _identity(document)),
                **settings,
            )
            row = run_job(job, Path(scratch))
            if row is None:
                failed.append(name)
                continue
            document["runs"].append(row)
            write_results(output, document)
            _echo_row(row)
    return failed


@click.command(context_settings={"show_default": True})
@click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="Text file: the first half is for calibration, the second half for measuring perplexity.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Dense model.  [default: the demo's, SmolLM2-135M]",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(list(METHODS)),
    default=list(METHODS),
    show_default="all",
)
@click.option("--samples", type=click.IntRange(1), default=128, help="Calibration samples.")
@click.option("--seqlen", type=click.IntRange(2), default=512, help="Tokens per sample.")
@click.option("--eval-tokens", type=click.IntRange(2), default=16384, help="Tokens to measure on.")
@click.option("--window", type=click.IntRange(2), default=1024, help="Tokens per window.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of samples and hashes.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("~/.cache/spallm-convert/quality"),
    help="Folder that keeps the demo's model, and calibrated blocks for runs that heal them.",
)
@click.option("--fresh", is_flag=True, help="Discard earlier results in the file.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=RESULTS / "quality.json",
    show_default="benchmarks/results/quality.json",
)
def main(**options: Any) -> None:
    """Quantize one dense model with several methods, and compare perplexity and bits."""
    if absent := missing_peers(options["methods"]):
        raise click.UsageError(
            f"not installed: {', '.join(absent)}; pip install -r benchmarks/quality_peers.txt, "
            f"build llama.cpp as benchmarks/quality/llamacpp.py says, or use --method to name "
            f"methods that do not need them"
        )
    try:
        failed = carry_out(options)
    except SpallmError as error:
        raise click.ClickException(str(error)) from error
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}")
    click.echo(f"written to {options['output']}")


if __name__ == "__main__":
    main()
