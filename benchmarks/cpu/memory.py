"""Measure peak memory and speed of converting a checkpoint that is much larger than memory use.

Conversion streams: at any time it holds one block of one tensor, so memory should not grow with the
model. To show that, a Llama checkpoint of random bf16 weights is written to a temporary folder and
converted by the command line in a separate process, whose peak resident memory the kernel reports.
The same is done for a model of the same size with experts, which are stored one by one.
A dry run loads the same libraries and reads headers only: it shows how much of the peak belongs to
the conversion itself.

A tiny checkpoint is converted first, so that numba's compiled code is in its cache. The time is
that of the whole process, including starting Python and importing torch and transformers. The
source has just been written, so parts of it may still be in the system's file cache.

    python -m benchmarks.cpu.memory                      writes benchmarks/results/memory.json
    python -m benchmarks.cpu.memory --gigabytes 0.3 --output some.json
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.shared.dense import LlamaShape, write_checkpoint
from benchmarks.shared.machine import RESULTS, machine, versions, write_results

_GIGA = 10**9
_OUTPUT_SHARD_SIZE = "500MB"
_PACKAGES = ("numpy", "numba", "torch", "transformers", "spallm-convert")
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def run_converter(*arguments: str) -> tuple[int, float]:
    """Run the command line; return the peak resident bytes of its process and its seconds."""
    code = "from spallm_convert.cli import main; main()"
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"the conversion ended with code {process.returncode}")
    if usage.ru_maxrss <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:
        # Linux counts the memory of the process that a new one was started from into its peak.
        raise click.ClickException("this process was larger than the one that it measured")
    return usage.ru_maxrss * _MAXRSS_UNIT, seconds


def measure(folder: Path, shape: LlamaShape) -> dict[str, Any]:
    """Convert a checkpoint of that shape below `folder`."""
    tiny, source, output = folder / "tiny", folder / "source", folder / "output"
    options = ("--max-shard-size", _OUTPUT_SHARD_SIZE, "-q")
    write_checkpoint(tiny, LlamaShape(1, hidden=1024, intermediate=1024, vocabulary=256))
    run_converter(str(tiny), "-o", str(folder / "tiny-output"), *options)
    click.echo(f"writing {shape.nbytes / _GIGA:.2f} GB, {shape.layers} layer(s)")
    write_checkpoint(source, shape)
    click.echo("converting")
    headers_peak, _ = run_converter(str(source), "--dry-run", *options)
    peak, seconds = run_converter(str(source), "-o", str(output), *options)
    weights = json.loads((output / "conversion.json").read_text())["totals"]["sketched_weights"]
    return {
        "peak_resident_bytes": peak,
        "peak_resident_bytes_dry_run": headers_peak,
        "seconds": seconds,
        "sketched_weights": weights,
        "weights_per_second": weights / seconds,
        "source": _sizes(source),
        "output": _sizes(output),
    }


def _sizes(folder: Path) -> dict[str, int]:
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return {"weight_files": len(sizes), "bytes": sum(sizes)}


@click.command(context_settings={"show_default": True})
@click.option(
    "--gigabytes",
    type=click.FloatRange(0, min_open=True),
    default=8.0,
    help="Size of the model, rounded to whole layers (at least one).",
)
@click.option(
    "--experts",
    type=click.IntRange(0),
    default=64,
    help="Experts per block of a second model of the same size; 0: no second model.",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder for the temporary folder.  [default: the system's temporary folder]",
    show_default=False,
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=RESULTS / "memory.json",
    show_default="benchmarks/results/memory.json",
    help="JSON file to write.",
)
def main(gigabytes: float, experts: int, folder: Path | None, output: Path) -> None:
    """Measure the peak memory of converting large synthetic checkpoints."""
    shapes = {"dense": LlamaShape.of_bytes(gigabytes * _GIGA)}
    if experts:
        shapes["experts"] = LlamaShape.of_bytes(gigabytes * _GIGA, experts)
    results = {}
    for name, shape in shapes.items():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            results[name] = found = measure(Path(scratch), shape)
        _show(found)
    document = {
        "benchmark": "memory",
        "machine": machine(),
        "versions": versions(*_PACKAGES),
        "settings": {
            "layers": {name: shape.layers for name, shape in shapes.items()},
            "experts": experts,
            "max_shard_size": _OUTPUT_SHARD_SIZE,
        },
        "results": results,
    }
    write_results(output, document)
    click.echo(f"written to {output}")


def _show(found: dict[str, Any]) -> None:
    click.echo(
        f"{found['source']['bytes'] / _GIGA:.2f} GB -> {found['output']['bytes'] / _GIGA:.2f} GB "
        f"in {found['seconds']:.1f} s ({found['weights_per_second'] / 1e6:.2f} M weights/s)\n"
        f"peak resident memory {found['peak_resident_bytes'] / 1e6:.0f} MB, of a dry run "
        f"{found['peak_resident_bytes_dry_run'] / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
