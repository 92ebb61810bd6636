"""Damaged checkpoints: what load_sketched and the Auto classes of transformers refuse, and how."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from spallm_convert import FormatError, SketchConfig, convert, load_sketched

FORMATS = Path(__file__).parents[2] / "formats"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 20,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 10,
    "dtype": "float32",
}
LOADERS = [load_sketched, AutoModelForCausalLM.from_pretrained]


@pytest.fixture(scope="module")
def sketched_folder(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sketched") / "out"
    convert(tiny_llama.folder, folder, SketchConfig(effort="fast", groups_per_row=2))
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


HOSTILE = sorted(path.parent for path in FORMATS.glob("hostile/*/error.txt"))
#: Damage of the data, which is not read before transformers reads it: only `verify` finds it.
IN_THE_DATA = {
    "experts-padding-set",
    "experts-table-not-finite",
    "padding-set",
    "table-not-finite",
}


@pytest.mark.parametrize(
    ("load", "hostile"),
    [
        (load, hostile)
        for load in LOADERS
        for hostile in HOSTILE
        if hostile.name not in IN_THE_DATA
        # Without a config, transformers does not know that it needs the quantizer.
        and (load is load_sketched or (hostile / "config.json").exists())
    ],
    ids=lambda value: getattr(value, "name", getattr(value, "__name__", "")),
)
def test_hostile_checkpoints(tmp_path, hostile, load):
    """With a config that transformers can parse, so that it goes on to the weights."""
    folder = shutil.copytree(hostile, tmp_path / "hostile")
    path = folder / "config.json"
    if path.exists():
        path.write_text(path.read_text().replace("{", f"{{{json.dumps(LLAMA)[1:-1]}, ", 1))
    with pytest.raises(FormatError) as caught:
        load(folder)
    expected = (hostile / "error.txt").read_text().strip()
    if hostile.name == "index-leaves-folder" and load is not load_sketched:
        expected = "no config.json"  # transformers says where the weights are, not why
    assert any(expected in problem for problem in caught.value.problems), caught.value.problems


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


@pytest.mark.parametrize("load", LOADERS)
def test_weights_under_another_name(folder, load):
    """Which would be loaded without being checked."""
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    edit(folder, transformers_weights="other.safetensors")
    with pytest.raises(FormatError, match=r"remove the key|is not a file of the checkpoint"):
        load(folder)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("dtype", ["int8", "bool", "float8_e4m3fn", 1])
def test_a_dtype_to_compute_in_that_is_no_float(folder, load, dtype):
    edit(folder, dtype=dtype)
    with pytest.raises(FormatError, match=r"cannot compute in dtype .* choose one with dtype="):
        load(folder)


@pytest.mark.parametrize("load", LOADERS)
def test_defaults_of_generate_that_are_no_object(folder, load):
    (folder / "generation_config.json").write_text("[1]")
    with pytest.raises(FormatError, match=r"generation_config.json is \[1\], expected an object"):
        load(folder)


BAD_CONFIGS = {
    "architectures": ([1], r"architectures is \[1\], expected a list of names"),
    "auto_map": ([1], r"auto_map is \[1\], expected an object"),
    "quantization_config": (["spallm"], "must be an object"),
    "dtype": ("nonsense", "no attribute 'nonsense'"),
    "hidden_act": ("nonsense", "cannot build the model of config.json .KeyError: 'nonsense'"),
    "model_type": ([], "cannot build the model of config.json .TypeError: unhashable"),
    "num_attention_heads": (0, "cannot build the model of config.json .ZeroDivisionError"),
    "num_hidden_layers": (1, "is not a linear layer of LlamaForCausalLM"),
    "vocab_size": (7, r"'lm_head.weight' has the shape \[128, 64\], the model expects \[7, 64\]"),
}


@pytest.mark.parametrize("key", BAD_CONFIGS)
def test_bad_values_in_the_config(folder, key):
    value, message = BAD_CONFIGS[key]
    edit(folder, **{key: value})
    with pytest.raises(FormatError, match=message) as caught:
        load_sketched(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["PreTrainedModel", "LlamaConfig", "AutoConfig", "logging"])
def test_an_architecture_that_is_no_model(folder, name):
    edit(folder, architectures=[name])
    with pytest.raises(FormatError, match=f"does not know the architecture '{name}'"):
        load_sketched(folder)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("change", [{"vocab_size": 10**9}, {"intermediate_size": 10**12}])
def test_a_model_far_larger_than_its_checkpoint_is_not_allocated(folder, load, change):
    edit(folder, **change)
    with pytest.raises(
        FormatError, match=r"describes a model of [\d,]+ weights, but the checkpoint"
    ):
        load(folder)


def test_errors_of_options_stay_those_of_transformers(folder):
    with pytest.raises(TypeError, match="nonsense"):
        load_sketched(folder, nonsense=1)
    with pytest.raises(ValueError, match="device_map"):
        load_sketched(folder, device_map="nonsense")


def test_a_config_of_another_checkpoint(folder):
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["hash_seed"] += 1
    with pytest.raises(FormatError, match="given config has another quantization_config"):
        AutoModelForCausalLM.from_pretrained(folder, config=config)


def test_a_config_may_ask_for_another_dtype_of_the_tables(folder):
    """As those of loaded models do, whose tables may have been cast."""
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["table_dtype"] = "float32"
    model = AutoModelForCausalLM.from_pretrained(folder, config=config)
    assert model.model.layers[0].mlp.up_proj.weight_table.dtype == torch.float32
