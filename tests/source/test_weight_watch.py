"""Reads of a layer's weight that are noticed while a model's code runs without weights."""

import os
import re

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from helpers.architectures import ARCHITECTURES, available
from helpers.meta_models import meta_model
from spallm_convert.source.linears import find_linears
from spallm_convert.source.weight_reads import known_reads
from spallm_convert.source.weight_watch import watch_weights


def double(layer):
    layer.weight.data.mul_(2)


def dtype_of(layers):
    return layers["down"].weight.dtype


class OwnMLP(modeling_llama.LlamaMLP):
    """Use weights in ways that the source of the class does not show."""

    def forward(self, x):
        double(self.gate_proj)
        x = x.to(torch.promote_types(dtype_of({"down": self.down_proj}), x.dtype))
        return super().forward(x.to(self.up_proj.weight.device))


class Failing(modeling_llama.LlamaMLP):
    """Need numbers after the first layer."""

    def forward(self, x):
        double(self.gate_proj)
        self.gate_proj(x).numpy()
        double(self.up_proj)
        return super().forward(x)


def own_llama(mlp, device="meta"):
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
        for layer in model.model.layers:
            layer.mlp = mlp(config)
    return model


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_reads_in_code_of_a_repository_keep_layers_dense(device):
    model = own_llama(OwnMLP, device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reasons = find_linears(model)[1]
    assert set(reasons) == {
        f"model.layers.{n}.mlp.{layer}.weight"
        for n in (0, 1)
        for layer in ("gate_proj", "down_proj")
    }
    assert reasons["model.layers.0.mlp.gate_proj.weight"] == (
        "the model's code reads its weight (double)"
    )
    if device == "cpu":
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all("forward" not in vars(module) for module in model.modules())


def test_what_was_noticed_before_an_error_counts():
    model = own_llama(Failing)
    assert list(find_linears(model)[1]) == ["model.layers.0.mlp.gate_proj.weight"]


def test_transformers_own_code_is_not_run(monkeypatch):
    """Check that its source is enough: a forward of a real size takes seconds."""
    model = meta_model("LlamaForCausalLM")
    monkeypatch.setattr(nn.Module, "__call__", None)
    assert len(find_linears(model)[0]) == 14


#: These have code that reads weights in different ways. `SPALLM_TEST_REACH=all` takes all classes.
SELECTED = (
    "LlamaForCausalLM",
    "BloomForCausalLM",
    "MptForCausalLM",
    "MambaForCausalLM",
    "Mamba2ForCausalLM",
    "FalconMambaForCausalLM",
    "JambaForCausalLM",
    "BambaForCausalLM",
    "Zamba2ForCausalLM",
    "NemotronHForCausalLM",
    "RwkvForCausalLM",
    "RecurrentGemmaForCausalLM",
    "DeepseekV4ForCausalLM",
    "T5ForConditionalGeneration",
    "SwitchTransformersForConditionalGeneration",
    "NllbMoeForConditionalGeneration",
    "WhisperForConditionalGeneration",
    "CLIPModel",
    "LlavaForConditionalGeneration",
    "Gemma3nForCausalLM",
)
NAMES = ARCHITECTURES if os.environ.get("SPALLM_TEST_REACH") == "all" else SELECTED
#: Early versions of transformers 5 cannot build Apertus without its weights.
BUILT = [
    name
    for name in filter(available, NAMES)
    if name != "ApertusForCausalLM" or available("Gemma4ForCausalLM")
]
#: `nn.Module.to(dtype)` reads a router's weight, and leaves integers as they are.
_MOVED = "router.classifier.weight"
#: NLLB-MoE casts its inputs to the dtype of this weight, but not to uint8.
_GUARDED = "ffn.fc2.weight"


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_the_source_shows_every_read_that_a_forward_does(name):
    model = meta_model(name)
    weights, unfit = find_linears(model)
    layers = [path for path in weights if path.endswith(".weight")]
    known = {path for path, _ in known_reads(model, layers)}
    noticed = {path for path in watch_weights(model, layers) if not path.endswith(_MOVED)}
    assert noticed <= known
    assert {path for path in noticed if not path.endswith(_GUARDED)} <= set(unfit)
    if name == "T5ForConditionalGeneration":
        assert {re.split(r"\.", path)[-2] for path in noticed} == {"wo"}
