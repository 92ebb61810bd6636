"""Measure what sketching the embedding and the head as well saves and costs, on a small model.

Each sketch is converted without a text, loaded in float32, and measured as in `benchmarks.quality`:
perplexity on the second half of a text. It also continues a sentence greedily. The file is written
after every row, and rows that it holds are not measured again.

    python -m benchmarks.quality.embeddings --text FILE      writes results/embeddings.json
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.shared.dense import dense_folder, digest, model_name
from benchmarks.shared.machine import RESULTS, machine, versions, write_results
from benchmarks.shared.processes import open_document
from spallm_convert import SketchConfig, convert, load_sketched
from spallm_convert.cli.terminal import EvaluationProgress, quiet_libraries
from spallm_convert.evaluation.perplexity import evaluate_text
from spallm_formats import sha256

from .one_run import halves

_PACKAGES = ("torch", "transformers", "numpy", "numba", "spallm-convert")
_BLOCKS = ("*.layers.*",)
#: Options of the conversion by name of the row; None is the dense model.
ROWS: dict[str, SketchConfig | None] = {
    "blocks and embedding, 1 group": SketchConfig(effort="fast", groups_per_row=1, embeddings=True),
    "blocks and embedding, 4 groups": SketchConfig(
        effort="fast", groups_per_row=4, embeddings=True
    ),
    "blocks, 1 group": SketchConfig(effort="fast", groups_per_row=1),
    "blocks, 4 groups": SketchConfig(effort="fast", groups_per_row=4),
    "embedding alone, 4 groups": SketchConfig(
        effort="fast", groups_per_row=4, embeddings=True, ignore=_BLOCKS
    ),
    "dense": None,
}


def measure(dense: Path, config: SketchConfig | None, text: str, options: dict[str, Any]) -> Any:
    """Convert and measure; return the row of results."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(dense)
    with tempfile.TemporaryDirectory() as folder:
        model: Any
        if config is None:
            model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
            size = sum(path.stat().st_size for path in dense.glob("*.safetensors"))
            row: dict[str, Any] = {"file_bytes": size, "bits_per_weight": 16.0}
        else:
            report = convert(dense, folder, config, overwrite=True)
            model = load_sketched(folder, dtype=torch.float32)
            row = {
                "file_bytes": sum(p.stat().st_size for p in Path(folder).glob("*.safetensors")),
                "bits_per_weight": report.totals["bits_per_weight"],
                "relative_error": report.totals["relative_error"],
            }
        with EvaluationProgress(hidden=True) as progress:
            found = evaluate_text(
                model,
                tokenizer,
                [text],
                window=options["window"],
                stride=options["window"],
                limit=options["eval_tokens"],
                progress=progress,
            )
        prompt = tokenizer(options["prompt"], return_tensors="pt")
        tokens = model.generate(**prompt, max_new_tokens=options["new_tokens"], do_sample=False)
    row |= {name: found[name] for name in ("perplexity", "nats_per_token", "tokens")}
    return row | {"continuation": tokenizer.decode(tokens[0], skip_special_tokens=True)}


@click.command(context_settings={"show_default": True})
@click.option("--text", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True)
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Dense model.  [default: the demo's, SmolLM2-135M]",
)
@click.option(
    "--row",
    "rows",
    multiple=True,
    type=click.Choice(list(ROWS)),
    default=list(ROWS),
    show_default="all",
)
@click.option("--fresh", is_flag=True, help="Discard earlier results in the file.")
@click.option("--eval-tokens", type=click.IntRange(2), default=16384, help="Tokens to measure on.")
@click.option("--window", type=click.IntRange(2), default=1024, help="Tokens per window.")
@click.option("--prompt", default="The capital of France is", help="Sentence to continue.")
@click.option("--new-tokens", type=click.IntRange(1), default=24, help="Tokens to generate.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("~/.cache/spallm-convert/quality"),
    help="Folder that keeps the demo's model.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=RESULTS / "embeddings.json",
    show_default="benchmarks/results/embeddings.json",
)
def main(**options: Any) -> None:
    """Measure a small model with its embedding dense and sketched."""
    quiet_libraries()
    dense = dense_folder(options["model"], None, options["cache"].expanduser())
    _, held_out = halves(options["text"].read_text(encoding="utf-8"))
    names = ("eval_tokens", "window", "prompt", "new_tokens")
    header = {
        "benchmark": "embeddings",
        "machine": machine(),
        "versions": versions(*_PACKAGES),
        "settings": {
            "model": model_name(options["model"]),
            "model_digest": digest(dense),
            "text": options["text"].name,
            "text_sha256": sha256(options["text"]),
            **{name: options[name] for name in names},
        },
    }
    document = open_document(options["output"], header, fresh=options["fresh"])
    done = {row["method"] for row in document["runs"]}
    for name in [name for name in options["rows"] if name not in done]:
        config = ROWS[name]
        row = measure(dense, config, held_out, options)
        document["runs"].append({"method": name, **row})
        write_results(options["output"], document)
        click.echo(f"{name}: {row['file_bytes'] / 1e6:.1f} MB, {row['perplexity']:.2f}")


if __name__ == "__main__":
    main()
