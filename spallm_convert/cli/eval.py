"""Define the command `spallm-convert eval MODEL`."""

from __future__ import annotations

import json
import math
from typing import Any

import click

from spallm_convert.devices import AUTO_DEVICE
from spallm_convert.evaluation.windows import STRIDE, WINDOW, check_windows, default_stride

from .lines import hide_bars, say


@click.command("eval", context_settings={"show_default": True})
@click.argument("model")
@click.option(
    "--text",
    metavar="SRC",
    help="Text to measure perplexity on: builtin, a text, .json or .jsonl file, or a dataset "
    "ORG/NAME[[:CONFIG]:SPLIT].  The first 64 Mi characters are read.",
)
@click.option("--window", type=int, default=WINDOW, help="Tokens that the model sees at once.")
@click.option(
    "--stride",
    type=int,
    help="Tokens from one window to the next; equal to --window: no overlap.  "
    f"[default: {STRIDE}, or half of --window if that is less]",
)
@click.option(
    "--tokens",
    metavar="N",
    type=click.IntRange(min=2),
    help="Measure only the first N tokens.  [default: all]",
)
@click.option(
    "--tasks",
    metavar="A,B",
    help="Also run tasks of lm-evaluation-harness (pip install 'spallm-convert[eval]').",
)
@click.option(
    "--device",
    metavar="auto|cpu|cuda|cuda:N",
    default=AUTO_DEVICE,
    help="Where to run; auto: a GPU if there is one.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Dtype to compute in; auto: the dtype of the checkpoint, bfloat16 for a GGUF file.",
)
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option("--trust-remote-code", is_flag=True, help="Allow model code from the repository.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(
    model: str,
    text: str | None,
    window: int,
    stride: int | None,
    tokens: int | None,
    tasks: str | None,
    device: str,
    dtype: str,
    revision: str | None,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure MODEL, sketched or dense: an id on the Hub, a folder, or a GGUF file."""
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if text is None and not names:
        raise click.UsageError("nothing to measure: give --text, --tasks, or both")
    hide_bars(quiet or as_json)
    from spallm_convert.evaluation.harness import load_harness, run_tasks
    from spallm_convert.evaluation.opening import load_any
    from spallm_convert.evaluation.perplexity import evaluate_text
    from spallm_convert.source.text import read_documents

    from .terminal import EvaluationProgress, quiet_libraries

    stride = default_stride(window) if stride is None else stride
    check_windows(window, stride)
    if names:
        load_harness()
    progress = EvaluationProgress(hidden=quiet or as_json)
    documents = None if text is None else read_documents(text, progress)
    quiet_libraries()
    document: dict[str, Any] = {"model": model}
    with progress:
        loaded, tokenizer = load_any(
            model,
            revision=revision,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        if documents is not None:
            result = evaluate_text(
                loaded,
                tokenizer,
                documents,
                window=window,
                stride=stride,
                limit=tokens,
                progress=progress,
            )
            document |= {"text": text, "window": window, "stride": stride} | result
    if names:
        document["tasks"] = run_tasks(loaded, tokenizer, names)
    if as_json:
        say(json.dumps(_numbers(document), indent=2, allow_nan=False))
    else:
        _print(document)


def _numbers(found: Any) -> Any:
    """Replace floats that are not finite by None, because JSON has no number for them."""
    if isinstance(found, dict):
        return {name: _numbers(value) for name, value in found.items()}
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _print(document: dict[str, Any]) -> None:
    if "text" in document:
        say(
            f"{document['tokens']:,} tokens of {document['text']} counted, "
            f"window {document['window']}, stride {document['stride']}"
        )
        say(f"nats per token: {document['nats_per_token']:.4f}")
        say(f"perplexity: {document['perplexity']:.4f}")
        if document["bits_per_byte"] is not None:
            say(f"bits per byte of the text: {document['bits_per_byte']:.4f}")
    for task, metrics in document.get("tasks", {}).items():
        for name, value in metrics.items():
            if not name.endswith(" stderr"):
                error = metrics.get(name + " stderr")
                say(f"{task}, {name}: {value:.4f}" + (f" +- {error:.4f}" if error else ""))
