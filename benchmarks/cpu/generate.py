"""Compare how fast a sketched model generates text on the CPU with dense models and llama.cpp.

SmolLM2-135M, one sequence, 64 tokens after a prompt of one token, the most likely token each time.
Models take turns in one process: dense and sketched (4 bits, effort fast), each in float32 and
in bfloat16, and sketched with the embedding, which is the output head too. `generate` of
transformers runs them all.

If the environment variable LLAMA_CPP names the folder of llama.cpp's source, with its programs in
`build/bin` (`make .llama-cpp/.installed` builds it), llama-bench takes turns with them: the
installed model as Q4_0 and Q4_K_M, as many tokens and threads. llama.cpp runs without Python, and
the head is quantized too.

At the end, `generate_parts.py` says where a step of a sketched model takes its time.

    python -m benchmarks.cpu.generate          writes benchmarks/results/generate.json
    python -m benchmarks.cpu.tables            prints the tables of docs/performance.md
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import numba
import torch

from benchmarks.quality import llamacpp
from benchmarks.shared.dense import dense_folder, digest, model_name
from benchmarks.shared.machine import RESULTS, Load, machine, versions, write_results
from spallm_convert import SketchConfig, convert, load_sketched
from spallm_convert.cli.demo_run import demo_model
from spallm_convert.cli.terminal import quiet_libraries
from spallm_kernels.cpu.vector_units import PORTABLE, host_unit

from .bars import bars_table, judged
from .generate_parts import Parts
from .turns import Row

_PACKAGES = ("torch", "transformers", "numba", "numpy", "spallm-convert")
_KINDS = ("Q4_0", "Q4_K_M")
_PROMPT = 504  # SmolLM2's token " the"; which one it is does not matter
_SHORT = 8  # tokens of the turn that is not counted
_DTYPES = (torch.float32, torch.bfloat16)
#: Least speed of the sketch, as a multiple of the dense model's.
_LIMITS = {"float32": 1.3, "bfloat16": 1.0}

Model = Any


def sketched(dense: Path, cache: Path, *, head: bool) -> Path:
    """Return the folder of the model sketched with effort fast; convert it if it is missing."""
    name = f"{digest(dense)}-generate" + "-head" * head
    config = SketchConfig(effort="fast", embeddings=head)
    convert(dense, cache / name, config, resume=(cache / name).exists())
    return cache / name


def load_models(dense: Path, cache: Path) -> dict[str, Model]:
    """Return the models by name."""
    from transformers import AutoModelForCausalLM

    found: dict[str, Model] = {}
    folders = {"sketch": sketched(dense, cache, head=False)}
    folders["sketch and head"] = sketched(dense, cache, head=True)
    for dtype in _DTYPES:
        found[_name("dense", dtype)] = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
        for kind, folder in folders.items():
            found[_name(kind, dtype)] = load_sketched(folder, dtype=dtype)
    return {name: model.eval() for name, model in found.items()}


def generate(model: Model, tokens: int) -> float:
    """Generate that many tokens after one; return tokens per second."""
    prompt = torch.tensor([[min(_PROMPT, model.config.vocab_size - 1)]])
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    with torch.inference_mode():
        start = time.perf_counter()
        found = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options
        )
        seconds = time.perf_counter() - start
    assert found.shape[1] == 1 + tokens
    return tokens / seconds


def llama_cpp(cache: Path) -> dict[str, Callable[[int], float]]:
    """Return functions from a number of tokens to llama-bench's speed; none if it is missing."""
    source = demo_model()
    if absent := llamacpp.missing_programs(speed=True):
        click.echo(f"llama.cpp is left out, because this is missing: {', '.join(absent)}")
        return {}
    folder = cache / f"{source.stem}-llama.cpp"
    threads = torch.get_num_threads()
    return {
        f"llama.cpp {kind}": partial(
            llamacpp.tokens_per_second,
            llamacpp.quantize_again(source, kind, folder),
            threads=threads,
        )
        for kind in _KINDS
    }


def measure(runs: dict[str, Callable[[int], float]], tokens: int, turns: int) -> dict[str, Row]:
    """Return tokens per second by name, turn by turn, and what other processes took meanwhile."""
    found: dict[str, Row] = {name: {"tokens_per_second": [], "elsewhere": []} for name in runs}
    for run in runs.values():
        run(_SHORT)
    for turn in range(turns):
        for name, run in runs.items():
            load = Load()
            found[name]["tokens_per_second"].append(run(tokens))
            found[name]["elsewhere"].append(load.elsewhere())
            speed = found[name]["tokens_per_second"][-1]
            click.echo(f"  turn {turn + 1}: {name:25}{speed:8.1f} tokens/s")
    return found


def medians(speeds: dict[str, Row]) -> dict[str, float]:
    """Return the median speed by name."""
    return {name: float(median(row["tokens_per_second"])) for name, row in speeds.items()}


def judge(speeds: dict[str, Row]) -> list[Row]:
    """Return the bars."""
    found = medians(speeds)
    return [
        judged(
            f"tokens/s of the sketch over the dense model's, {name}",
            ">=",
            limit,
            found[f"sketch {name}"] / found[f"dense {name}"],
        )
        for name, limit in _LIMITS.items()
    ]


def _name(kind: str, dtype: torch.dtype) -> str:
    return f"{kind} {str(dtype).removeprefix('torch.')}"


@click.command(context_settings={"show_default": True})
@click.option("--tokens", type=click.IntRange(min=1), default=64, help="Tokens to generate.")
@click.option("--turns", type=click.IntRange(min=1), default=7, help="Timed turns.")
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of a dense model.  [default: the installed SmolLM2-135M-Instruct]",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=Path("~/.cache/spallm-convert/quality"),
    help="Folder that keeps the models.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=RESULTS / "generate.json",
    show_default="benchmarks/results/generate.json",
)
def main(tokens: int, turns: int, model: Path | None, cache: Path, output: Path) -> None:
    """Compare how fast a sketched model generates text with dense models and llama.cpp."""
    quiet_libraries()
    cache = cache.expanduser()
    dense = dense_folder(model, None, cache)
    models = load_models(dense, cache)
    others = llama_cpp(cache) if model is None else {}
    runs = {name: partial(generate, loaded) for name, loaded in models.items()} | others
    speeds = measure(runs, tokens, turns)
    parts = {name: Parts(loaded).measure(tokens) for name, loaded in models.items()}
    unit = host_unit()
    bars = judge(speeds)
    document = {
        "benchmark": "generate",
        "machine": machine(),
        "versions": versions(*_PACKAGES) | ({"llama.cpp": llamacpp.version()} if others else {}),
        "settings": {
            "model": model_name(model),
            "model_digest": digest(dense),
            "tokens": tokens,
            "turns": turns,
            "unit": PORTABLE if unit is None else unit.name,
            "threads": {"torch": torch.get_num_threads(), "numba": numba.get_num_threads()},
        },
        "speeds": speeds,
        "medians": medians(speeds),
        "step_milliseconds": parts,
        "bars": bars,
    }
    write_results(output, document)
    for name, found in parts.items():
        click.echo(f"{name}: " + ", ".join(f"{part} {ms:.2f} ms" for part, ms in found.items()))
    click.echo(f"{bars_table('generating', bars)}\nwritten to {output}")


if __name__ == "__main__":
    main()
