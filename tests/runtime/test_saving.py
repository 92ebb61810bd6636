"""Saving with several dtypes of tables: the widest is saved, and what is saved loads equal."""

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from helpers.training import trainer
from spallm_convert import SketchConfig, SketchedLinear, convert, load_sketched
from spallm_formats import SketchedCheckpoint

TOKENS = torch.arange(2, 40).reshape(2, 19)


@pytest.fixture(scope="module")
def sketched_folder(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sketched") / "out"
    convert(tiny_llama.folder, folder, SketchConfig(effort="fast", groups_per_row=2))
    return folder


def mixed(folder, *dtypes):
    """Load a model, and give its tables these dtypes in turn."""
    model = load_sketched(folder, dtype=torch.float32)
    for index, layer in enumerate(layers(model)):
        layer.weight_table.data = layer.weight_table.data.to(dtypes[index % len(dtypes)])
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, SketchedLinear)]


def assert_saved(folder, model, table_dtype):
    """Check that the checkpoint keeps the format, and has the values of the model."""
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["table_dtype"] == table_dtype
    assert list(SketchedCheckpoint.open(folder).deep_problems()) == []
    again = load_sketched(folder)
    for name, value in model.named_parameters():
        found = again.get_parameter(name)
        if name.endswith(".weight_table"):
            assert str(found.dtype) == f"torch.{table_dtype}"
            assert torch.equal(found, value.to(found.dtype))
        else:
            assert torch.equal(found, value)


KINDS = {
    "float32": (torch.bfloat16, torch.float32),
    "float32, reversed": (torch.float32, torch.bfloat16),
    "float32, of 16 bits": (torch.float16, torch.bfloat16),
}


@pytest.mark.parametrize("given", [False, True], ids=["", "given"])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_the_widest_dtype_is_saved(sketched_folder, tmp_path, kinds, given):
    model = mixed(sketched_folder, *kinds)
    model.save_pretrained(tmp_path, state_dict=dict(model.state_dict()) if given else None)
    assert_saved(tmp_path, model, "float32")
    assert {layer.weight_table.dtype for layer in layers(model)} == set(kinds)  # unchanged


def test_the_dtypes_are_those_of_a_given_state_dict(sketched_folder, tmp_path):
    model = mixed(sketched_folder, torch.bfloat16, torch.float32)
    given = {
        name: value.bfloat16() if name.endswith(".weight_table") else value
        for name, value in model.state_dict().items()
    }
    model.save_pretrained(tmp_path, state_dict=given)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in given.items())
    load_sketched(tmp_path)


def test_trainer_saves_the_widest_dtype(sketched_folder, tmp_path):
    model = mixed(sketched_folder, torch.bfloat16, torch.float32)
    run = trainer(model, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    run.train()
    run.save_model(str(tmp_path / "model"))
    for folder in ("model", "checkpoint-1"):
        assert_saved(tmp_path / folder, model, "float32")


def test_a_sharded_model_saves_the_widest_dtype(sketched_folder, tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting-point", rank=0, world_size=1
    )
    try:
        model = mixed(sketched_folder, torch.bfloat16, torch.float32)
        for module in layers(model):
            fully_shard(module)
        fully_shard(model)
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        assert {v.dtype for n, v in whole.items() if "table" in n} > {torch.bfloat16}
        model.save_pretrained(tmp_path / "model", state_dict=whole)
    finally:
        dist.destroy_process_group()
    assert_saved(
        tmp_path / "model", mixed(sketched_folder, torch.bfloat16, torch.float32), "float32"
    )


def test_float64_is_rounded_to_the_widest_dtype_of_the_format(sketched_folder, tmp_path):
    model = load_sketched(sketched_folder, dtype=torch.float64)
    with pytest.warns(UserWarning, match="float64 sketch tables are saved rounded to float32"):
        model.save_pretrained(tmp_path)
    assert_saved(tmp_path, model, "float32")


def test_another_caller_than_save_pretrained_is_told_how_to_keep_the_tables(sketched_folder):
    model = load_sketched(sketched_folder)
    with pytest.raises(RuntimeError, match="would lose trained tables: save them with save_tables"):
        model.hf_quantizer.get_state_dict_and_metadata(model)
