"""Layers that transformers loads in float32 whatever the dtype of the model is."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

from helpers.tiny_models import save_tiny_llama
from spallm_convert import SketchConfig, convert
from spallm_convert.runtime.kept_dtypes import restore_dtypes, table_dtypes


@pytest.fixture(scope="module")
def sketched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    save_tiny_llama(folder / "source")
    convert(folder / "source", folder / "sketched", SketchConfig(effort="fast", groups_per_row=1))
    return folder / "sketched"


@pytest.mark.parametrize("listed", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_listed_layers_have_the_dtypes_of_others(sketched, tmp_path, monkeypatch, listed, dtype):
    monkeypatch.setattr(LlamaForCausalLM, listed, {"up_proj"})
    model = LlamaForCausalLM.from_pretrained(sketched, dtype=dtype)
    assert set(table_dtypes(model).values()) == {dtype}
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    tables = [p for name, p in model.named_parameters() if name.endswith("weight_table")]
    assert all(table.requires_grad for table in tables)
    assert model(torch.arange(8)[None]).logits.dtype == dtype
    if dtype == torch.bfloat16:
        model.save_pretrained(tmp_path)
        saved, loaded = (load_file(f / "model.safetensors") for f in (tmp_path, sketched))
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(value, loaded[name]) for name, value in saved.items())
        assert all(value.dtype == loaded[name].dtype for name, value in saved.items())


def test_an_index_map_of_floats_becomes_bytes_again(sketched):
    model = LlamaForCausalLM.from_pretrained(sketched)
    layer, planned = model.model.layers[1].mlp.down_proj, table_dtypes(model)
    codes = layer.weight
    layer.weight = nn.Parameter(codes.data.float(), requires_grad=False)
    restore_dtypes(model, planned)
    assert torch.equal(layer.weight, codes)
    assert layer.weight.dtype == torch.uint8
    assert not layer.weight.requires_grad
