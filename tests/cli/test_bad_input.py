"""Bad input, as a user meets it: one clear line, the right exit code, nothing that looks whole."""

import json
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.tiny_models import save_tiny_llama
from spallm_convert.cli import main
from spallm_formats import FormatError, SketchedCheckpoint

#: What a report says of a module.
MODULE = {
    "name": "layer",
    "shape": [4, 4],
    "bits": 4,
    "groups_per_row": 1,
    "bits_per_weight": 4,
    "relative_error": 0,
}


@pytest.fixture
def source(tiny_llama, tmp_path):
    """A copy of a model, to be broken."""
    return shutil.copytree(tiny_llama.folder, tmp_path / "source")


@pytest.fixture
def fails(capsys, tmp_path):
    """Runs the command line and checks how it fails; gives the line on stderr."""

    def run(code, *arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        assert stopped.value.code == code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        if code == 1:
            assert len(lines) == 1, lines
            assert lines[0].startswith("spallm-convert: error: ")
            with pytest.raises(FormatError):
                SketchedCheckpoint.open(tmp_path / "out")
        return lines[-1]

    return run


def edit_tensor(folder, name, change):
    """Applies `change` to the uint16 bit patterns of a bf16 tensor on disk."""
    from spallm_formats import read_header

    tensor = read_header(folder / "model.safetensors")[name]
    data = np.memmap(folder / "model.safetensors", np.uint8, "r+")
    part = data[tensor.offset : tensor.offset + tensor.nbytes].view(np.uint16)
    change(part.reshape(tensor.shape))
    data.flush()


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


NAME = "model.layers.1.mlp.up_proj.weight"


def test_no_such_folder(fails, tmp_path):
    line = fails(1, tmp_path / "nowhere", "-o", tmp_path / "out")
    assert "no such folder or file" in line
    assert "nowhere" in line


def test_a_home_of_nobody_is_a_name_like_others(fails, tmp_path):
    line = fails(1, "~nobody-by-this-name/model", "-o", tmp_path / "out")
    assert "~nobody-by-this-name/model" in line


def test_too_many_threads_are_refused_before_anything_is_read(fails, tmp_path):
    line = fails(2, tmp_path / "nowhere", "-o", tmp_path / "out", "--threads", "100000")
    assert "threads must be 1 to" in line


def test_no_config(fails, source, tmp_path):
    (source / "config.json").unlink()
    assert "no config.json in it" in fails(1, source, "-o", tmp_path / "out")


def test_no_safetensors(fails, source, tmp_path):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    line = fails(1, source, "-o", tmp_path / "out")
    assert "no model.safetensors" in line
    assert "pytorch_model.bin" in line


def test_truncated_shard(fails, source, tmp_path):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    line = fails(1, source, "-o", tmp_path / "out")
    assert "model.safetensors" in line
    assert "truncated" in line


def test_header_that_lies_about_its_size(fails, source, tmp_path):
    path = source / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])
    assert "its header would have 1,152,921,504,606,846,976 bytes" in fails(
        1, source, "-o", tmp_path / "out"
    )


def test_missing_shard(fails, sharded_llama, tmp_path):
    source = shutil.copytree(sharded_llama.folder, tmp_path / "source")
    shard = sorted(source.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"shard {shard.name} is missing" in fails(1, source, "-o", tmp_path / "out")


@pytest.mark.parametrize(("bits", "shown"), [(0x7FC0, "nan"), (0xFF80, "-inf")])
def test_weights_that_are_not_finite(fails, source, tmp_path, bits, shown):
    edit_tensor(source, NAME, lambda rows: rows.__setitem__((17, 5), bits))
    line = fails(1, source, "-o", tmp_path / "out", "--max-shard-size", "30KB", "-q")
    assert f"{NAME!r} holds {shown} at row 17, column 5" in line
    # Left dense, the same layer is no obstacle.
    ignored = NAME.removesuffix(".weight")
    with pytest.raises(SystemExit) as stopped:
        main([str(source), "-o", str(tmp_path / "ok"), "--ignore", ignored, "-q"])
    assert stopped.value.code == 0


def test_groups_that_do_not_divide_a_row(fails, source, tmp_path):
    line = fails(2, source, "-o", tmp_path / "out", "--groups-per-row", "5")
    assert not (tmp_path / "out").exists()
    assert "groups_per_row 5 does not divide" in line
    assert "model.layers.0.self_attn.q_proj (64 columns)" in line


def test_unsupported_dtype(fails, source, tmp_path):
    path = source / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[NAME]["dtype"] = "I16"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    line = fails(1, source, "-o", tmp_path / "out")
    assert f"{NAME!r} has the dtype I16, only BF16, F16, F32 can be sketched" in line


def test_weight_of_another_shape_than_the_config(fails, source, tmp_path):
    edit_config(source, intermediate_size=192)
    assert "is [160, 64], the model expects [192, 64]" in fails(1, source, "-o", tmp_path / "out")


def test_quantized_already(fails, source, tmp_path):
    edit_config(source, quantization_config={"quant_method": "gptq"})
    assert "already quantized (gptq)" in fails(1, source, "-o", tmp_path / "out")


def test_unknown_architecture(fails, source, tmp_path):
    edit_config(source, architectures=["NoSuchModel"])
    line = fails(1, source, "-o", tmp_path / "out")
    assert "does not know the architecture 'NoSuchModel'" in line


def test_remote_code_needs_consent(fails, source, tmp_path):
    edit_config(source, architectures=["MyModel"], auto_map={"AutoModel": "modeling.MyModel"})
    assert "--trust-remote-code" in fails(1, source, "-o", tmp_path / "out")


def test_remote_code_that_is_named_in_lists(fails, source, tmp_path):
    classes = {"AutoTokenizer": ["tokens.MyTokenizer", None], "AutoModel": "modeling.MyModel"}
    edit_config(source, architectures=["MyModel"], auto_map=classes)
    assert "--trust-remote-code" in fails(1, source, "-o", tmp_path / "out")


@pytest.mark.parametrize("architectures", [[], [None], {"a": 1}, "LlamaForCausalLM", None])
def test_architectures_that_are_no_names(fails, source, tmp_path, architectures):
    edit_config(source, architectures=architectures)
    assert "no architectures are named" in fails(1, source, "-o", tmp_path / "out")


def test_no_name_at_all(fails, tmp_path):
    assert "no model is named" in fails(1, "", "-o", tmp_path / "out")


def test_revisions_are_for_the_hub(fails, source, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for model in (source, tmp_path / "model.gguf"):
        line = fails(1, model, "--revision", "main", "-o", tmp_path / "out")
        assert f"--revision is for models on the Hub, {model} is on this machine" in line


@pytest.mark.parametrize("zeros", [50, 2])
def test_damaged_gguf(fails, tmp_path, zeros):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\3\0\0\0" + b"\1" * 9 + b"\0" * zeros)
    assert "transformers cannot read it" in fails(
        1, tmp_path / "model.gguf", "-o", tmp_path / "out"
    )


def test_nothing_to_sketch(fails, source, tmp_path):
    line = fails(1, source, "-o", tmp_path / "out", "--ignore", "*")
    assert "no linear layer to sketch" in line


def test_output_that_is_not_empty(fails, source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    line = fails(1, source, "-o", tmp_path / "out")
    assert "is not empty: use --overwrite" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    line = fails(1, source, "-o", tmp_path / "out" / "thesis.txt")
    assert "is a file" in line


def test_output_that_is_the_source(fails, source):
    before = {path: path.read_bytes() for path in source.iterdir()}
    assert "is the source itself" in fails(2, source, "-o", source, "--overwrite")
    assert {path: path.read_bytes() for path in source.iterdir()} == before


def test_output_that_is_the_source_by_another_name(fails, source, tmp_path, monkeypatch):
    """As on a disk that takes no notice of case, or where a folder is mounted twice."""
    other = shutil.copytree(source, tmp_path / "other")
    monkeypatch.setattr(Path, "samefile", lambda path, to: {path, to} == {source, other})
    assert "is the source itself" in fails(2, source, "-o", other, "--overwrite")


def test_patterns_that_match_nothing(fails, source, tmp_path):
    line = fails(2, source, "-o", tmp_path / "out", "--ignore", "*.downproj")
    assert "--ignore '*.downproj': matches no linear layer" in line
    assert "near names are model.layers.*.mlp.down_proj" in line


def test_a_recipe_that_cannot_be_read(fails, source, tmp_path):
    line = fails(2, source, "-o", tmp_path / "out", "--recipe", tmp_path / "none.toml")
    assert "none.toml: cannot be read (No such file or directory)" in line


def test_values_that_the_tables_cannot_hold(fails, source, tmp_path):
    edit_tensor(source, NAME, lambda rows: rows.__setitem__((17, 5), 0x4974))  # 1e6 in bf16
    line = fails(1, source, "-o", tmp_path / "out", "--table-dtype", "float16", "-q")
    assert f"{NAME!r} has values in row 17 that float16 tables cannot hold" in line


def test_a_config_that_makes_no_sense(fails, source, tmp_path):
    edit_config(source, hidden_size="wide")
    assert "cannot build LlamaForCausalLM" in fails(1, source, "-o", tmp_path / "out")


def test_a_misspelt_command(fails):
    assert "did you mean 'inspect'?" in fails(2, "inspct", "out")


def test_usage(fails, source, tmp_path):
    assert "No such option" in fails(2, source, "--bitz", "4")
    assert "'5' is not one of" in fails(2, source, "--bits", "5")
    assert "expected a number or 'auto', found 'many'" in fails(
        2, source, "--groups-per-row", "many"
    )
    assert "expected a size" in fails(2, source, "--max-shard-size", "many")
    assert "cannot be combined" in fails(2, source, "--resume", "--overwrite")
    assert "Missing argument" in fails(2, "convert")


def test_unknown_key_in_a_sketched_config(fails, source, tmp_path, capsys):
    from spallm_convert import convert, load_sketched

    convert(source, tmp_path / "sketched")
    config = json.loads((tmp_path / "sketched/config.json").read_text())
    config["quantization_config"]["act_order"] = True
    (tmp_path / "sketched/config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="unknown key 'act_order'"):
        load_sketched(tmp_path / "sketched")
    assert "unknown key 'act_order'" in fails(1, "inspect", tmp_path / "sketched")


@pytest.mark.parametrize(
    "change",
    [
        {"healing": None},
        {"healing": {"kl_before": 1.0}},
        {"healing": {"kl_before": 1.0, "kl_after": "0.5"}},
        {"predicted_loss": 1.0},
        {"predicted_loss": {"2": 1.0}},
        {"predicted_loss": {"chosen": 1.0, "2": []}},
        {"modules": [{"name": "layer", "shape": [4, 4], "bits": 4}]},
        {"modules": [MODULE | {"relative_error": None}]},
        {"modules": [MODULE | {"shape": 16}]},
        {"left_dense": {"lm_head": 1}},
    ],
)
def test_reports_that_are_not_as_they_should_be(tiny_llama, tmp_path, capsys, change):
    from spallm_convert import convert

    convert(tiny_llama.folder, tmp_path / "out")
    path = tmp_path / "out/conversion.json"
    report = json.loads(path.read_text())
    sound = {"healing": {"kl_before": 1, "kl_after": 0.5}, "predicted_loss": {"chosen": 0.1}}
    sound["modules"] = [MODULE]
    for more, code in ((sound, 0), (change, 1)):
        path.write_text(json.dumps(report | more))
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", str(tmp_path / "out")])
        assert (stopped.value.code or 0) == code
    assert "conversion.json: not a report of a conversion" in capsys.readouterr().err


def test_disk_too_small_is_known_beforehand(fails, source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    error = fails(1, source, "-o", tmp_path / "out", "--effort", "fast")
    assert "its disk has 1,000 free" in error


def test_disk_that_fills_up(source, tmp_path):
    """A limit on file sizes fails writes as a full disk does; afterwards the run is resumable."""
    script = """
import resource, sys
from spallm_convert.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
main(sys.argv[1:])
"""
    command = [source, "-o", tmp_path / "out", "-q"]
    small = subprocess.run(
        [sys.executable, "-c", script, "50000", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert small.returncode == 1
    assert small.stderr.startswith("spallm-convert: error: File too large")
    assert small.stderr.count("\n") == 1
    with pytest.raises(FormatError):
        SketchedCheckpoint.open(tmp_path / "out")
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, command), "--resume"])
    assert stopped.value.code == 0
    SketchedCheckpoint.open(tmp_path / "out")


@pytest.mark.slow
def test_interrupt(tmp_path):
    """Ctrl-C in the middle of the work: exit code 130, one line that says how to go on."""
    model = save_tiny_llama(
        tmp_path / "source", hidden_size=512, intermediate_size=4096, num_hidden_layers=24
    )
    script = """
import signal
from spallm_convert.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
main()
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        [*command, model.folder, "-o", tmp_path / "out", "--threads", "1"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()  # the first tenth is done
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130, (process.returncode, line, rest)
    assert rest.splitlines()[-1] == (
        "spallm-convert: interrupted; continue with --resume, without --overwrite"
    )
    assert "Traceback" not in rest
    with pytest.raises(FormatError):
        SketchedCheckpoint.open(tmp_path / "out")
