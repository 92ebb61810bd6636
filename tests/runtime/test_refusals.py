"""Damaged checkpoints: what load_sketched and the Auto classes of transformers refuse, and how."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spallm_convert import FormatError, SketchConfig, convert, load_sketched

LOADERS = [load_sketched, AutoModelForCausalLM.from_pretrained]


@pytest.fixture(scope="module")
def sketched_folder(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sketched") / "out"
    convert(tiny_llama.folder, folder, SketchConfig(groups_per_row=2))
    return folder


@pytest.fixture
def folder(sketched_folder, tmp_path):
    return shutil.copytree(sketched_folder, tmp_path / "damaged")


def edit(folder, **changes):
    """Change the config of a folder, or its quantization_config by a function."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config[name] = value(config.get(name)) if callable(value) else value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("load", LOADERS)
def test_two_names_of_one_layer(folder, load):
    stored, other = "model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"
    tensors = load_file(folder / "model.safetensors")
    copies = {other + name.removeprefix(stored): t for name, t in tensors.items() if stored in name}
    assert len(copies) == 2
    save_file(
        tensors | {name: tensor.clone() for name, tensor in copies.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )

    def twice(quantization):
        modules = quantization["modules"]
        return quantization | {"modules": modules | {other: modules[stored]}}

    edit(folder, quantization_config=twice)
    with pytest.raises(FormatError, match=f"modules '{stored}' and '{other}' are the same layer"):
        load(folder)
