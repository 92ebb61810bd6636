"""Mixers of state-space models, which pass the weight of a layer to a kernel in training."""

import copy

import pytest
import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba

from spallm_convert.runtime.evaluation_mode import keep_in_evaluation
from spallm_convert.runtime.linear import SketchedLinear
from spallm_formats import SketchedModule


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    model = MambaForCausalLM(config)
    for path in ("in_proj", "out_proj"):
        for layer in model.backbone.layers:
            dense = layer.mixer.get_submodule(path)
            layer.mixer.set_submodule(path, sketched_like(dense))
    keep_in_evaluation(model)
    return model


def sketched_like(dense):
    sizes = {"in_features": dense.in_features, "out_features": dense.out_features}
    shape = SketchedModule(**sizes, bits=4, groups_per_row=1)
    layer = SketchedLinear(shape, bias=dense.bias, table_dtype=torch.float32)
    layer.weight.data.random_(0, 256)
    nn.init.normal_(layer.weight_table, std=0.02)
    return layer


def modes(model):
    return {
        name: module.training for name, module in model.named_modules() if name.endswith("mixer")
    }


def test_mixers_stay_in_evaluation_mode(model):
    assert model.training
    assert set(modes(model).values()) == {False}
    assert model.eval().backbone.layers[0].mixer.conv1d.training is False
    assert model.train().backbone.layers[0].mixer.conv1d.training is True
    assert set(modes(model).values()) == {False}
    copied = copy.deepcopy(model)
    copied.backbone.layers[0].mixer.conv1d.eval()
    copied.train()
    assert copied.backbone.layers[0].mixer.conv1d.training is True
    assert set(modes(copied).values()) == {False}


def test_training_never_reads_an_index_map(model, monkeypatch):
    """Replace the fused kernel, which is on no machine of the tests."""

    def kernel(*arguments, **options):
        raise AssertionError("the fused kernel got the weight of a sketched layer")

    monkeypatch.setattr(modeling_mamba, "mamba_inner_fn", kernel, raising=False)
    tokens = torch.arange(12).reshape(2, 6)
    model.train()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    gradient = model.backbone.layers[0].mixer.out_proj.weight_table.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    model.eval()
    assert torch.equal(model(tokens, labels=tokens).loss, loss)


def test_dense_mixers_are_trained_as_before():
    config = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4)
    dense = MambaForCausalLM(config)
    keep_in_evaluation(dense)
    assert set(modes(dense.train()).values()) == {True}
