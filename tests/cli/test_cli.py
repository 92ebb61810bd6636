"""The command line: what it prints, and that it answers at once."""

import io
import json
import re
import subprocess
import sys

import pytest
from rich.console import Console

from helpers.tiny_models import save_tiny_llama
from spallm_convert import Report, verify
from spallm_convert.cli import main, terminal
from spallm_convert.cli.convert import default_output
from spallm_convert.cli.printing import print_report


@pytest.fixture
def run(capsys):
    def call(*arguments, code=0):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert stopped.value.code == code, captured.err
        return captured.out

    return call


def test_model_alone_converts(run, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run(tiny_llama.folder)
    folder = tmp_path / f"{tiny_llama.folder.name}-spallm-4bit"
    assert (folder / "config.json").is_file()
    assert "model.layers.1.mlp.down_proj" in out
    assert "relative error of the sketched weights: 0.0" in out
    assert run("verify", folder) == f"{folder}: no problems found\n"
    assert "LlamaForCausalLM: 14 sketched layers, 4 bits" in run("inspect", folder)
    document = json.loads(run("inspect", folder, "--json"))
    assert document["quantization_config"]["bits"] == 4


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B-spallm-3bit"),
        ("./folder/", "folder-spallm-3bit"),
        ("x/model.Q4_1.gguf", "model.Q4_1-spallm-3bit"),
    ],
)
def test_default_output(model, name):
    assert str(default_output(model, 3)) == name


def test_dry_run_writes_nothing(run, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run(tiny_llama.folder, "--dry-run")
    assert "2 x model.layers.*.mlp.down_proj" in out
    assert "times smaller" in out
    totals = run(tiny_llama.folder, "--dry-run", "-q")
    assert totals in out
    assert "model.layers" not in totals
    assert "times larger" in run(tiny_llama.folder, "--dry-run", "--groups-per-row", "32")
    plan = json.loads(run(tiny_llama.folder, "--dry-run", "--json"))
    assert len(plan["modules"]) == 14
    assert not list(tmp_path.iterdir())


def test_dry_run_with_the_embedding_and_the_head(run, tiny_llama, tmp_path):
    source = save_tiny_llama(tmp_path, tie_word_embeddings=True).folder
    plan = json.loads(run(tiny_llama.folder, "--dry-run", "--json", "--embeddings", "--lm-head"))
    assert {"model.embed_tokens", "lm_head"} <= plan["modules"].keys()
    plan = json.loads(run(source, "--dry-run", "--json", "--lm-head"))
    assert len(plan["modules"]) == 15
    assert "model.embed_tokens" in plan["modules"]


def test_json_is_the_report(run, tiny_llama, tmp_path):
    out = run(
        tiny_llama.folder, "-o", tmp_path / "out", "--json", "--bits", "2", "--mapping", "hash"
    )
    report = json.loads(out)
    assert report.pop("output") == str(tmp_path / "out")
    assert report == json.loads((tmp_path / "out/conversion.json").read_text())
    assert report["options"]["mapping"] == "hash"


@pytest.mark.parametrize(
    ("options", "advised"),
    [
        (["--bits", "3"], True),
        (["--mapping", "hash"], True),
        ([], False),
        (["--bits", "3", "--calibration", "builtin"], False),
        (["--bits", "3", "--json"], False),
        (["--bits", "3", "-q"], False),
    ],
)
def test_few_bits_without_calibration_get_advice(options, advised, tiny_llama, capsys):
    with pytest.raises(SystemExit):
        main([str(tiny_llama.folder), "--dry-run", *options])
    assert ("consider --effort best" in capsys.readouterr().err) == advised


@pytest.mark.parametrize(
    ("options", "remarked"),
    [(["--mapping", "hash"], True), (["--mapping", "hash", "-q"], False), ([], False)],
)
def test_converting_with_hashed_maps_ends_with_what_they_are_for(
    options, remarked, tiny_llama, tmp_path, capsys
):
    with pytest.raises(SystemExit):
        main([str(tiny_llama.folder), "-o", str(tmp_path / "out"), *options])
    out, err = capsys.readouterr()
    sentence = (
        "a hashed index map keeps only the mean of the weights that collide: without training"
    )
    assert (sentence in (err.splitlines() or [""])[-1]) == remarked
    assert sentence not in out


def test_quiet_is_quiet(run, tiny_llama, tmp_path):
    assert run(tiny_llama.folder, "-o", tmp_path / "out", "-q") == ""


def test_remarks_stay_on_a_terminal_and_lines_do_not(monkeypatch):
    shown = Console(file=io.StringIO(), force_terminal=True, width=40)
    monkeypatch.setattr(terminal, "stderr", shown)
    with terminal.ConversionProgress() as progress:
        progress.start(10)
        progress.advance(5, "layer")
        progress.say("a line for now")  # of work whose end the weights do not tell
        progress._bar.refresh()
        assert "%" not in shown.file.getvalue().splitlines()[-1]
        progress.remark("a remark that is longer than the terminal is wide, to its very end")
        progress.advance(5, "layer")
        progress._bar.refresh()
        assert "100%" in shown.file.getvalue().splitlines()[-1]
    last = shown.file.getvalue()
    assert "a remark that is longer than the terminal is wide, to its very end\n" in last.replace(
        "\r", ""
    )


def test_a_checkpoint_without_a_report(run, tiny_llama, tmp_path):
    run(tiny_llama.folder, "-o", tmp_path / "out", "-q")
    assert verify(tmp_path / "out") == []
    (tmp_path / "out/conversion.json").unlink()
    (problem,) = verify(tmp_path / "out")
    assert problem == "conversion.json is missing, so there are no hashes to compare with"
    assert Report.read(str(tmp_path / "out")) is None


def test_verify_finds_one_flipped_bit(run, tiny_llama, tmp_path):
    run(tiny_llama.folder, "-o", tmp_path / "out", "-q")
    path = tmp_path / "out/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    run("verify", tmp_path / "out", code=3)
    path.write_bytes(data[:-1])
    run("verify", tmp_path / "out", code=3)


def test_help_answers_at_once():
    """Nothing slow is imported: on an idle machine that is well under a second."""
    result = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-c",
            "from spallm_convert.cli import main; main()",
            "--help",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "MODEL is an id on the Hub" in result.stdout
    assert re.search(r"\|\s+click$", result.stderr, re.MULTILINE)
    for slow in ("torch", "numba", "transformers", "triton", "huggingface_hub"):
        assert not re.search(rf"\|\s+{slow}$", result.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    "command", ["convert", "demo", "doctor", "eval", "inspect", "push", "verify"]
)
def test_every_command_has_help(run, command):
    assert "Usage: spallm-convert" in run(command, "--help")


def test_no_color_is_honoured(run, tiny_llama, monkeypatch):
    """A console reads the environment when it is made."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")

    def styled():
        monkeypatch.setattr(terminal, "stdout", terminal.SafeConsole())
        return re.findall(r"\x1b\[[0-9;]*3[0-9]m", run(tiny_llama.folder, "--dry-run"))

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert styled()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not styled()


def test_the_widest_table_fits_a_terminal(capsys, monkeypatch):
    """Layers as large as those of a Llama of 8B, with bits by layer."""
    monkeypatch.setattr(terminal, "stdout", Console(width=80, force_terminal=True, no_color=True))
    row = {
        "name": "model.layers.31.self_attn.q_proj",
        "shape": [14336, 14336],
        "groups_per_row": 4,
        "bits_per_weight": 4.016,
        "relative_error": 0.1234,
        "relative_output_error": 0.0123,
    }
    totals = {"sketched_weights": 1, "kept_weights": 1, "bits_per_weight": 4.016, "ratio": 4.0}
    totals |= {"source_bytes": 8, "sketched_bytes": 2}
    totals |= {"relative_error": 0.1, "relative_output_error": 0.1}
    modules = [row | {"bits": bits} for bits in (3, 4)]
    unread = {key: value for key, value in row.items() if key != "relative_output_error"}
    modules.append(unread | {"name": "embedding", "bits": 2})  # the text does not reach it
    print_report(Report({"modules": modules, "totals": totals, "left_dense": {}}))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for bits in (3, 4):
        assert f"{row['name']} 14336 x 14336 {bits} 4 4.016 0.1234 0.0123" in lines
    assert "embedding 14336 x 14336 2 4 4.016 0.1234" in lines
