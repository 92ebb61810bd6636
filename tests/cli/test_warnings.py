"""Warnings about a result are printed once, to stderr, even if everything else is quiet."""

import json
import os
import subprocess
import sys

import pytest

from helpers.tiny_gguf import save_tiny_gguf
from helpers.tiny_models import add_matrices, save_tiny_llama
from spallm_convert.cli import main


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model with matrices that are not the weights of linear layers."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("matrices")).folder
    return add_matrices(folder, "model.layers.0.extra.weight")


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
@pytest.mark.parametrize("quiet", [(), ("--quiet",), ("--json",)])
def test_a_model_that_stays_dense(source, tmp_path, capfd, options, quiet):
    words = [source, "-o", tmp_path / "out", "--groups-per-row", "1", *options, *quiet]
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 0
    out, err = capfd.readouterr()
    assert err.count("stay dense") == 1
    assert "warning: " in err
    assert "stay dense: model.layers.*.extra (transformers does not load it)" in err
    assert "stay dense" not in out
    if quiet == ("--json",):
        assert json.loads(out)["left_dense"]
    if quiet == ("--quiet",) and not options:
        assert out == ""


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_strict_conversion_fails_with_one_line(source, tmp_path, capfd, options):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in (source, "-o", tmp_path / "out", "--strict", *options)])
    assert stop.value.code == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "stay dense: model.layers.*.extra (transformers does not load it); --strict" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_gguf_file_is_read_without_a_bar(tmp_path):
    """tqdm reads its variables when it is imported, so this needs a process of its own."""
    model = save_tiny_gguf(tmp_path / "model.gguf")
    run = "from spallm_convert.cli import main; main()"
    command = [sys.executable, "-c", run, model, "-o", tmp_path / "out", "--quiet"]
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""


def test_a_recipe_with_few_bits_is_advised_to_be_calibrated(tiny_llama, write, capfd):
    recipe = write("recipe.json", '{"*.up_proj": {"bits": 2}, "*.q_proj": {"dense": true}}')
    with pytest.raises(SystemExit) as stop:
        main([str(tiny_llama.folder), "--recipe", recipe, "--dry-run"])
    assert stop.value.code == 0
    out, err = capfd.readouterr()
    assert err.startswith("2 bits lose much of the model's quality with effort normal")
    assert "left dense: 2 x model.layers.*.self_attn.q_proj: left dense by the recipe" in out
