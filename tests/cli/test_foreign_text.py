"""Names in files cannot send escape codes to the terminal, whatever command prints them."""

import ast
import io
import json
import shutil
import struct
from pathlib import Path

import pytest
from rich.table import Table
from safetensors.torch import load_file, save_file

from spallm_convert.cli import main, terminal
from spallm_convert.cli.lines import say
from spallm_convert.cli.terminal import ConversionProgress, SafeConsole, print_table

EVIL = "\x1b]0;EVIL\x07\x9b2J\u202e"
CLI = Path(main.__code__.co_filename).parent


def run(capfd, *words):
    """Run a command; return its exit code and all that it printed."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    printed = "".join(capfd.readouterr())
    assert "EVIL" in printed
    assert not set(printed) & set(EVIL) - set("]0;EVIL2J"), ascii(printed)
    return stop.value.code, printed


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.name)
def test_only_two_modules_print(path):
    if path.name in {"lines.py", "terminal.py"}:
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    called = {ast.unparse(call.func) for call in calls}
    assert not called & {"print", "click.echo", "click.secho", "Console", "sys.stdout.write"}


@pytest.fixture
def source(tiny_llama, tmp_path):
    """A dense model with an evil name and an evil tensor in one of its blocks."""
    folder = shutil.copytree(tiny_llama.folder, tmp_path / f"model-{EVIL}")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[f"model.layers.0.{EVIL}"] = tensors["model.layers.0.mlp.up_proj.weight"].clone()
    save_file(tensors, path, {"format": "pt"})
    return folder


def test_conversion(source, tmp_path, capfd):
    assert run(capfd, source, "--dry-run")[0] == 0
    code, printed = run(capfd, source, "-o", tmp_path / f"out-{EVIL}")
    assert code == 0
    assert r"left dense: 1 x model.layers.*.\x1b]0;EVIL\x07\x9b2J\u202e" in printed
    assert run(capfd, "inspect", tmp_path / f"out-{EVIL}")[0] == 0
    assert run(capfd, "verify", tmp_path / f"out-{EVIL}")[0] == 0


def test_damaged_checkpoint(tiny_llama, tmp_path, capfd):
    with pytest.raises(SystemExit):
        main([str(tiny_llama.folder), "-o", str(tmp_path / "out"), "-q"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    modules = config["quantization_config"]["modules"]
    modules |= {f"{EVIL}{i}": next(iter(modules.values())) for i in range(100)}
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    code, printed = run(capfd, "verify", tmp_path / "out")
    assert code == 3
    assert len(printed.splitlines()) <= 21
    assert "more problems" in printed
    for command in ("inspect", "push"):
        code, printed = run(capfd, command, tmp_path / "out", *["a/b"] * (command == "push"))
        assert code == 1
        assert len(printed.splitlines()) == 1
        assert len(printed) < 2000


@pytest.mark.parametrize(
    "words",
    [
        (f"./{EVIL}",),
        ("eval", f"./{EVIL}", "--text", "builtin"),
        ("eval", "x", "--text", f"./{EVIL}"),
        ("verify", f"./{EVIL}"),
        ("inspect", f"./{EVIL}"),
        ("inspect", "a", f"{EVIL}"),
        ("convert", "a", f"--{EVIL}"),
        ("convert", "a", "--bits", EVIL),
    ],
)
def test_errors(words, capfd):
    assert run(capfd, *words)[0] in {1, 2, 3}


def test_header_with_evil_names(tmp_path, capfd):
    text = json.dumps({EVIL: {"dtype": EVIL, "shape": EVIL, "data_offsets": EVIL}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert run(capfd, tmp_path)[0] == 1


def test_tables_and_bars_of_a_terminal(monkeypatch):
    screen = io.StringIO()
    console = SafeConsole(file=screen, force_terminal=True, width=200)
    monkeypatch.setattr(terminal, "stderr", console)
    monkeypatch.setattr(terminal, "stdout", console)
    table = Table(EVIL)
    table.add_row(EVIL)
    print_table(table)
    with ConversionProgress() as progress:
        progress.say(EVIL)
        progress.start(10)
        progress.advance(5, EVIL)
        progress.remark(EVIL)
    printed = screen.getvalue()
    assert printed.count("EVIL") >= 5
    assert "\x1b]0" not in printed
    assert not set(printed) & {"\x07", "\x9b", "\u202e"}


def test_lines_keep_what_is_harmless(capsys):
    say("two\nlines\twith a tab, größer, 中文")
    assert capsys.readouterr().out == "two\nlines\twith a tab, größer, 中文\n"


@pytest.mark.parametrize(
    ("weights", "shown"), [(31_000, "0.031 M"), (9_500_000, "9.5 M"), (3 * 10**9, "3,000 M")]
)
def test_small_models_are_not_rounded_to_nothing(weights, shown, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "stderr", SafeConsole(stderr=True, width=200))
    with ConversionProgress() as progress:
        progress.start(weights)
        progress.advance(weights, "layer")
    assert f"100% of {shown} weights sketched: layer" in capsys.readouterr().err
