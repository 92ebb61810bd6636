"""The documentation keeps its word: examples run, messages are those of the code, links lead
somewhere. How a block is marked that cannot run: `helpers/documented.py`."""

import ast
import re
import shutil
from pathlib import Path

import pytest
import torch

from helpers.documented import ROOT, commands, examples, lay_out, pages, run_command, run_python
from spallm_convert.cli.convert import command as convert_command

SOURCES = ("spallm_convert", "formats/spallm_formats", "kernels/spallm_kernels")
#: Fewest characters that a message must share with one in the code, names and numbers left out.
_LEAST_SHARED = 12


@pytest.fixture
def few_samples(monkeypatch):
    """Calibrate with 8 samples unless a page says otherwise: the usual 128 take a minute in all."""
    (samples,) = (p for p in convert_command.params if p.name == "samples")
    monkeypatch.setattr(samples, "default", 8)


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("documented") / "folder"
    folder.mkdir()
    lay_out(folder)
    return folder


@pytest.mark.slow
@pytest.mark.apart
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
# PEFT 0.21 asks transformers 5.23 by the former name.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("page", pages())
def test_examples_run(page, laid_out, tmp_path, monkeypatch, few_samples):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = tmp_path / "folder"
    shutil.copytree(laid_out, folder)
    monkeypatch.chdir(folder)
    names = {"__name__": "__main__"}
    for example in examples(ROOT / page):
        if example.reason is not None:
            continue
        where = f"{page}, line {example.line}"
        if example.kind == "python":
            run_python(example, names)
            continue
        for words in commands(example.code):
            assert run_command(words) == 0, f"{where}: {' '.join(words)}"


def test_blocks_are_marked_with_a_reason_or_run():
    found = [example for page in pages() for example in examples(ROOT / page)]
    run = [example for example in found if example.reason is None]
    assert {example.kind for example in run} == {"python", "console"}
    assert len(run) > len(found) / 2
    for example in found:
        where = f"{example.page}, line {example.line}"
        assert example.reason is None or len(example.reason) > 5, f"{where}: no reason given"
        assert example.kind == "python" or commands(example.code), f"{where}: no command"


def test_every_mark_belongs_to_a_block():
    for page in pages():
        text = (ROOT / page).read_text(encoding="utf-8")
        used = [example for example in examples(ROOT / page) if example.reason is not None]
        assert text.count("<!-- no-run") == len(used), page


def test_troubleshooting_shows_messages_of_the_code():
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```text\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    assert shown
    patterns = list(_messages())
    unknown = [line for line in shown if not any(p.search(line) for p in patterns)]
    assert unknown == []


def test_links_between_files_lead_somewhere():
    """Sphinx checks those between pages; these are read on the repository's own site, too."""
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "formats/SPEC.md"):
        path = ROOT / name
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{name}: {target}"


def _messages():
    """Every f-string and text of the code that may be a message, as a pattern."""
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                pattern = _pattern(node)
                if pattern is not None:
                    yield pattern


def _pattern(node: ast.AST) -> re.Pattern[str] | None:
    values = node.values if isinstance(node, ast.JoinedStr) else [node]
    parts = [v.value if isinstance(v, ast.Constant) else None for v in values]
    fixed = "".join(part for part in parts if isinstance(part, str))
    if len(fixed) < _LEAST_SHARED or "\n" in fixed:
        return None
    return re.compile(".*".join(re.escape(p) if isinstance(p, str) else "" for p in parts))
