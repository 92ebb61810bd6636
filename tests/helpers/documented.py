"""Examples in the documentation: finding them, and running them as a reader would.

An example is a fenced block of `python` or `console`. A block that cannot run offline has a comment
directly before it that says why: `<!-- no-run: needs the Hub -->`. All others run, page by page, in
order, in one folder and with one set of Python names. Lines of a console block that start with `$ `
are commands.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent

#: What the pages call their model, text to calibrate on, text to measure on, and training data.
MODEL, TEXT, OTHER_TEXT, RECORDS = "meta-llama/Llama-3.2-1B", "text.txt", "book.txt", "train.json"

_BLOCK = re.compile(
    r"(?:^<!-- no-run: *(?P<reason>.*?) *-->\n)?^```(?P<kind>python|console)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Example:
    """A block of a page; reason: why it is not run, if it is not."""

    page: str
    line: int
    kind: str
    code: str
    reason: str | None


def pages() -> list[str]:
    """Every page with examples, relative to the repository."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found if examples(path)]


def examples(path: Path) -> list[Example]:
    """The examples of a page, in order."""
    text = path.read_text(encoding="utf-8")
    return [
        Example(
            path.name,
            text.count("\n", 0, match.start("code")) + 1,
            match["kind"],
            match["code"],
            match["reason"],
        )
        for match in _BLOCK.finditer(text)
    ]


def commands(code: str) -> list[list[str]]:
    """The words of every command of a console block."""
    lines = [line for line in code.splitlines() if line.startswith("$ ")]
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]


def run_python(example: Example, names: dict[str, Any]) -> None:
    """Runs a block; a traceback shows the page's line."""
    padding = "\n" * (example.line - 1)
    exec(compile(padding + example.code, example.page, "exec"), names)


def run_command(words: list[str]) -> int:
    """Runs `spallm-convert` or a Python script in this process; returns the exit code."""
    if words[0] == "spallm-convert":
        from spallm_convert.cli import main

        try:
            main(words[1:])
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0
    if words[0] == "python":
        _run_script(words[1:])
        return 0
    raise AssertionError(f"{' '.join(words)}: mark the block with <!-- no-run: reason -->")


def _run_script(words: list[str]) -> None:
    before = sys.argv
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.argv = before


def lay_out(folder: Path) -> None:
    """Puts what the pages name into a folder: a small Llama with a tokenizer, texts, records."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = folder / MODEL
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    tokenizer.save_pretrained(model)
    words = (ROOT / "LICENSE").read_text()
    (folder / TEXT).write_text(words * 6)
    (folder / OTHER_TEXT).write_text((ROOT / "CHANGELOG.md").read_text() * 4)
    records = [{"instruction": f"Count to {n}.", "output": f"{n}"} for n in range(232)]
    (folder / RECORDS).write_text(json.dumps(records))
    shutil.copytree(ROOT / "examples", folder / "examples")


def byte_tokenizer() -> Any:
    """A token per byte, so that it takes any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(["</s>", *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )
