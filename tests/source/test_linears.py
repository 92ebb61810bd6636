"""Which weights of a model may be sketched, and why others may not."""

import re

import pytest
import torch
import transformers
from torch import nn

from helpers.meta_models import meta_model
from spallm_convert.source import linear_like
from spallm_convert.source.linear_weights import LinearWeight
from spallm_convert.source.linears import find_linears, is_in_block


def starred(name):
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def fit(model):
    """Return the weights that may be sketched, with a star for the number of a block."""
    weights, unfit = find_linears(model)
    return {starred(name): weight for name, weight in weights.items() if name not in unfit}


def unfit(model):
    return {starred(name): reason for name, reason in find_linears(model)[1].items()}


def newer(name):
    """Mark an architecture that the oldest supported transformers lacks."""
    known = hasattr(transformers, name)
    return [name] if known else []


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "ImageGPTForCausalImageModeling"]
)
def test_transposed_layers_are_found(name):
    found = fit(meta_model(name))
    assert len(found) == 4
    assert LinearWeight(96, 32, transposed=True) in found.values()
    assert all(weight.transposed for weight in found.values())


def test_subclasses_of_linear_layers_are_found():
    found = fit(meta_model("FalconForCausalLM"))
    assert found["transformer.h.*.self_attention.query_key_value.weight"].in_features == 32
    assert len(found) == 4
    assert not any(weight.transposed for weight in found.values())


class GroupedLinear(nn.Linear):
    """Multiply each of two parts of the inputs with rows of its own, as DeepSeek-V4 does."""

    def forward(self, x):
        weight = self.weight.view(2, -1, self.in_features).transpose(1, 2)
        y = x.reshape(-1, 2, self.in_features).transpose(0, 1) @ weight
        return y.transpose(0, 1).reshape(*x.shape[:-2], 2, -1)


def test_layers_that_compute_something_else_stay_dense():
    model = meta_model("LlamaForCausalLM")
    model.model.layers[1].mlp.grouped = GroupedLinear(16, 32)
    reason = "GroupedLinear computes more than the product with its weight"
    assert unfit(model) == {"model.layers.*.mlp.grouped.weight": reason}
    for name in newer("DeepseekV4ForCausalLM"):
        latest = meta_model(name)
        path = "model.layers.*.self_attn.o_a_proj.weight"
        assert unfit(latest)[path].startswith("DeepseekV4GroupedLinear computes more than")
        assert "model.layers.*.self_attn.compressor.kv_proj.weight" in fit(latest)


def test_routers_stay_dense():
    reason = "Llama4Router computes more than the product with its weight"
    path = "model.layers.*.feed_forward.router.weight"
    assert unfit(meta_model("Llama4ForCausalLM"))[path] in (reason, "it chooses the experts")
    hunyuan = unfit(meta_model("HunYuanMoEV1ForCausalLM"))
    assert hunyuan == {"model.layers.*.mlp.gate.wg.weight": "it chooses the experts"}


def test_layers_of_a_list_are_found_and_lists_of_heads_are_not():
    assert "model.altup_projections.0.weight" in find_linears(meta_model("Gemma3nForCausalLM"))[0]
    assert "model.visual.merger.mlp.*.weight" in fit(meta_model("Qwen2VLForConditionalGeneration"))
    assert not any("lm_heads" in name for name in fit(meta_model("MusicgenForCausalLM")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.up_proj", True),
        ("visual.merger.mlp.0", True),
        ("altup_projections.0", True),
        ("layers.3.head.0", True),
        ("lm_heads.1", False),
        ("score.classifier.0", False),
        ("lm_head", False),
        ("multi_modal_projector.linear_1", False),
    ],
)
def test_only_layers_of_blocks_and_lists_count(name, expected):
    assert is_in_block(name) is expected


@pytest.mark.parametrize(
    "name",
    ["MambaForCausalLM", "FalconMambaForCausalLM", "JambaForCausalLM"],
)
def test_state_space_mixers_keep_one_layer_dense(name):
    model = meta_model(name)
    found = {path.rpartition(".mixer.")[2] or path for path in fit(model)}
    assert {"in_proj.weight", "x_proj.weight", "out_proj.weight"} <= {
        path.rpartition(".mamba.")[2] for path in found
    }
    reads = {path.rsplit(".", 2)[1]: reason for path, reason in unfit(model).items()}
    reason = reads.get("dt_proj", "the model's code reads its weight (")
    assert reason.startswith("the model's code reads its weight (")
    assert not {"in_proj", "x_proj", "out_proj"} & set(reads)


@pytest.mark.parametrize(
    "name",
    [
        "Mamba2ForCausalLM",
        "BambaForCausalLM",
        "FalconH1ForCausalLM",
        "GraniteMoeHybridForCausalLM",
        *newer("NemotronHForCausalLM"),
    ],
)
def test_newer_state_space_mixers_are_sketched_whole(name):
    model = meta_model(name)
    assert set(unfit(model).values()) <= {"it chooses the experts"}
    assert {"in_proj", "out_proj"} <= {path.rsplit(".", 2)[1] for path in fit(model)}


@pytest.mark.parametrize(
    ("name", "layer", "function"),
    [
        ("T5ForConditionalGeneration", r"DenseReluDense\.wo", "T5DenseActDense.forward"),
        ("RwkvForCausalLM", r"attention\.output|feed_forward\.value", "RwkvModel._rescale_layers"),
        ("WavLMModel", r"\w+_proj", "WavLMAttention.torch_multi_head_self_attention"),
        ("Swinv2Model", r"position_bias_mlp\.0", "Swinv2SelfAttention"),
    ],
)
def test_layers_whose_weight_is_read_stay_dense(name, layer, function):
    reasons = find_linears(meta_model(name))[1]
    assert reasons
    for path, reason in reasons.items():
        assert re.search(rf"({layer})\.weight$", path)
        assert reason.startswith(f"the model's code reads its weight ({function}")


def test_the_config_decides_whether_code_runs():
    assert not unfit(meta_model("BloomForCausalLM"))
    exact = unfit(meta_model("BloomForCausalLM", pretraining_tp=2, slow_but_exact=True))
    assert set(exact) == {
        "transformer.h.*.self_attention.dense.weight",
        "transformer.h.*.mlp.dense_4h_to_h.weight",
    }


@pytest.mark.parametrize(
    "name",
    [
        "ViTModel",
        "BeitModel",
        "Dinov2Model",
        "DINOv3ViTModel",
        "CLIPModel",
        "SiglipModel",
        *newer("NomicBertModel"),
    ],
)
def test_encoders_are_sketched_whole(name):
    model = meta_model(name)
    inside = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", path)
    }
    weights, reasons = find_linears(model)
    assert not reasons
    assert set(weights) == inside


def test_tied_weights_stay_dense():
    model = meta_model("LlamaForCausalLM")
    path = "model.layers.0.mlp.up_proj.weight"
    model.all_tied_weights_keys = {path: "model.layers.1.mlp.up_proj.weight"}
    reason = "the model ties its weight to that of another layer"
    assert unfit(model) == {starred(path): reason}


@pytest.mark.parametrize(
    ("name", "options", "layers"),
    [
        (
            "LlamaForCausalLM",
            {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
            224,
        ),
        ("GPT2LMHeadModel", {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 192),
    ],
)
def test_real_sizes_take_few_forwards(name, options, layers, monkeypatch):
    """Check that the work does not grow with the number of layers."""
    forwards = []
    call = nn.Module.__call__
    monkeypatch.setattr(
        nn.Module, "__call__", lambda m, *a, **k: forwards.append(m) or call(m, *a, **k)
    )
    proofs = []
    proof = linear_like._stored_transposed
    monkeypatch.setattr(linear_like, "_stored_transposed", lambda m: proofs.append(m) or proof(m))
    model = meta_model(name, **options)
    assert len(find_linears(model)[0]) == layers
    assert len(proofs) <= 1
    assert len(forwards) <= 9  # one that fails, then two dtypes, two modes, and two inputs
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(isinstance(module, torch.nn.Linear) for module in forwards)
