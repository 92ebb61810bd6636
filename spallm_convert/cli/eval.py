"""`spallm-convert eval MODEL`."""

from __future__ import annotations

import json
import math
from typing import Any

import click

from spallm_convert.devices import AUTO_DEVICE


@click.command("eval", context_settings={"show_default": True})
@click.argument("model")
@click.option(
    "--text",
    metavar="SRC",
    help="Measure perplexity on it: builtin, a text, .json or .jsonl file, or a dataset "
    "ORG/NAME[[:CONFIG]:SPLIT].",
)
@click.option("--window", type=int, default=1024, help="Tokens that the model sees at once.")
@click.option(
    "--stride",
    type=int,
    default=512,
    help="Tokens from one window to the next; as many as --window: no overlap.",
)
@click.option(
    "--tokens", type=click.IntRange(min=2), help="Tokens of the text to measure.  [default: all]"
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
    help="Where to run; auto is a GPU if there is one.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Type to compute in; auto is that of the checkpoint, bfloat16 for a GGUF file.",
)
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option("--trust-remote-code", is_flag=True, help="Allow model code from the repository.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(
    model: str,
    text: str | None,
    window: int,
    stride: int,
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
    from spallm_convert.evaluation.harness import load_harness, run_tasks
    from spallm_convert.evaluation.opening import load_any
    from spallm_convert.evaluation.perplexity import check_windows, evaluate_text
    from spallm_convert.source.text import read_documents

    from .terminal import EvaluationProgress, quiet_libraries

    check_windows(window, stride)
    if names:
        load_harness()
    documents = None if text is None else read_documents(text)
    quiet_libraries()
    document: dict[str, Any] = {"model": model}
    with EvaluationProgress(hidden=quiet or as_json) as progress:
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
        click.echo(json.dumps(_numbers(document), indent=2, allow_nan=False))
    else:
        _print(document)


def _numbers(found: Any) -> Any:
    """null for floats that JSON has no number for: a perplexity beyond them, metrics of no task."""
    if isinstance(found, dict):
        return {name: _numbers(value) for name, value in found.items()}
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _print(document: dict[str, Any]) -> None:
    if "text" in document:
        click.echo(
            f"{document['tokens']:,} tokens of {document['text']} counted, "
            f"window {document['window']}, stride {document['stride']}"
        )
        click.echo(f"nats per token: {document['nats_per_token']:.4f}")
        click.echo(f"perplexity: {document['perplexity']:.4f}")
        if document["bits_per_byte"] is not None:
            click.echo(f"bits per byte of the text: {document['bits_per_byte']:.4f}")
    for task, metrics in document.get("tasks", {}).items():
        for name, value in metrics.items():
            if not name.endswith(" stderr"):
                error = metrics.get(name + " stderr")
                click.echo(f"{task}, {name}: {value:.4f}" + (f" +- {error:.4f}" if error else ""))
