"""Importance of columns: the mean squares of inputs, as hooks on a whole dense model see them."""

import math
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.blocks import open_blocks
from helpers.calibrated_models import save_model
from spallm_convert import CalibrationError, SketchConfig
from spallm_convert.calibration.importance import measure_importance
from spallm_convert.progress import Silent
from spallm_convert.sketch.plan import make_plan
from spallm_convert.source.locate import find_here

SAMPLES, SEQLEN = 6, 16
#: The package adds up squares of float32 inputs block by block, the whole model in one pass.
TOLERANCE = {"rtol": 1e-4, "atol": 0}


def draw_tokens():
    return torch.randint(2, 128, (SAMPLES, SEQLEN), generator=torch.Generator().manual_seed(0))


def measured(source, folder, batch=2):
    """Return the importance by layer; files are kept in a folder."""
    folder.mkdir(exist_ok=True)
    config = SketchConfig(effort="fast", groups_per_row=1)
    plan = make_plan(find_here(str(source)).open(source), config)
    blocks = open_blocks(source, draw_tokens(), batch)
    return measure_importance(blocks, plan, folder, Silent())


def hooked(kind, source, wanted=nn.Linear):
    """Run all samples through the whole model; return positional inputs of modules, by path."""
    model = getattr(transformers, kind).from_pretrained(source, dtype=torch.float32).eval()
    seen = {}
    for path, module in model.named_modules():
        if isinstance(module, wanted):
            module.register_forward_pre_hook(
                lambda _, args, path=path: seen.setdefault(path, []).append(args)
            )
    tokens = draw_tokens()
    more = {}
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = tokens.roll(1, 1)
        first = getattr(model.config, "decoder_start_token_id", None)
        more["decoder_input_ids"][:, 0] = first or 0
    with torch.no_grad():
        model(tokens, **more)
    return model, seen


def mean_squares(calls):
    """Return the mean square of each column over all tokens of all calls of a linear layer."""
    inputs = torch.cat([args[0].reshape(-1, args[0].shape[-1]) for args in calls]).double()
    return inputs.square().mean(0)


def assert_importance(found, expected):
    """Check the importance of a layer against mean squares [columns] or [experts, columns]."""
    expected = torch.atleast_2d(expected)
    least = 1e-4 * expected.mean(1, keepdim=True)
    found = torch.atleast_2d(torch.from_numpy(found))
    torch.testing.assert_close(found, expected.maximum(least).float(), **TOLERANCE)


@pytest.mark.parametrize("batch", [1, 6])
def test_linear_layers_of_a_llama(source, tmp_path, batch):
    found = measured(source, tmp_path / "kept", batch)
    _, seen = hooked("AutoModelForCausalLM", source)
    del seen["lm_head"]
    assert found.keys() == seen.keys()
    for path, calls in seen.items():
        assert_importance(found[path], mean_squares(calls))


@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_a_second_list_of_blocks(kind, tmp_path):
    source = save_model(kind, tmp_path / "model")
    found = measured(source, tmp_path / "kept")
    _, seen = hooked(kind, source)
    del seen["lm_head"]
    assert any("decoder" in name for name in found)
    left_dense = seen.keys() - found.keys()
    assert all(path.endswith("DenseReluDense.wo") for path in left_dense)  # T5 needs float32 there
    for path, importance in found.items():
        assert_importance(importance, mean_squares(seen[path]))
    # The outputs of the first list are not kept, so neither is anything else.
    assert not list((tmp_path / "kept").iterdir())


def inputs_of_experts(module, calls, activate):
    """Return what each expert multiplies: inputs of the first weights, and of the second."""
    hidden, chosen = (torch.cat([args[n] for args in calls]) for n in (0, 1))
    first = [hidden[(chosen == expert).any(1)] for expert in range(module.num_experts)]
    with torch.no_grad():
        return first, [activate(module, expert, x) for expert, x in enumerate(first)]


def shrunk(inputs):
    """Return mean squares [experts, columns], as if each expert had seen 16 more average tokens."""
    sums = torch.stack([x.double().square().sum(0) for x in inputs])
    counts = torch.tensor([len(x) for x in inputs])
    mean = sums.sum(0) / counts.sum()
    return (sums + 16 * mean) / (counts + 16)[:, None]


def test_experts_that_are_stored_apart(tmp_path):
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    def activate(module, expert, x):
        gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
        return module.act_fn(gate) * up

    source = save_model("MixtralForCausalLM", tmp_path / "model")
    found = measured(source, tmp_path / "kept")
    model, seen = hooked("MixtralForCausalLM", source, MixtralExperts)
    for path, calls in seen.items():
        stored = path.replace(".mlp.", ".block_sparse_moe.")
        first, second = inputs_of_experts(model.get_submodule(path), calls, activate)
        assert len({len(x) for x in first}) > 1  # experts differ
        for names, inputs in ((("w1", "w3"), first), (("w2",), second)):
            for expert, expected in enumerate(shrunk(inputs)):
                for name in names:
                    assert_importance(found[f"{stored}.{expert}.{name}"], expected)


def test_experts_that_are_stored_together(tmp_path):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    def activate(module, expert, x):
        gate_up = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
        return module._apply_gate(gate_up)

    source = save_model("GptOssForCausalLM", tmp_path / "model")
    found = measured(source, tmp_path / "kept")
    model, seen = hooked("GptOssForCausalLM", source, GptOssExperts)
    for path, calls in seen.items():
        first, second = inputs_of_experts(model.get_submodule(path), calls, activate)
        assert_importance(found[f"{path}.gate_up_proj"], shrunk(first))
        assert_importance(found[f"{path}.down_proj"], shrunk(second))


def test_an_expert_without_tokens_gets_the_mean_of_all(tmp_path):
    """Let the router of the first block choose the same two of four experts for every token."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    source = save_model("GptOssForCausalLM", tmp_path / "model")
    edit(source, "model.layers.0.mlp.router.bias", lambda bias: bias[2:].fill_(-1e4))
    found = measured(source, tmp_path / "kept")["model.layers.0.mlp.experts.gate_up_proj"]
    _, seen = hooked("GptOssForCausalLM", source, GptOssExperts)
    assert found.shape == (4, 32)
    # Two see all tokens, so the mean of all experts is theirs too.
    expected = mean_squares([(args[0],) for args in seen["model.layers.0.mlp.experts"]])
    for importance in found:
        assert_importance(importance, expected)
    other = measured(source, tmp_path / "other")["model.layers.1.mlp.experts.gate_up_proj"]
    assert abs(other[0] / other[1] - 1).max() > 0.01


def edit(source, name, change):
    """Change a tensor of a checkpoint with one shard in place."""
    path = source / "model.safetensors"
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_column_that_is_never_active_keeps_the_least_importance(tmp_path):
    source = save_model("MixtralForCausalLM", tmp_path / "model")
    edit(source, "model.layers.0.input_layernorm.weight", lambda norm: norm[3:5].fill_(0))
    (found,) = measured(source, tmp_path / "kept")["model.layers.0.self_attn.q_proj"]
    others = [column for column in range(32) if column not in {3, 4}]
    expected = 1e-4 * found[others].sum() / 32
    assert found[3:5] == pytest.approx(expected, rel=1e-5)
    assert found[others].min() > 100 * expected


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_inputs_that_are_not_finite_name_the_layer(source, tmp_path, value):
    """Include inputs whose squares are not finite in float32."""
    broken = shutil.copytree(source, tmp_path / "broken")
    edit(
        broken,
        "model.layers.1.post_attention_layernorm.weight",
        lambda norm: norm[3:4].fill_(value),
    )
    message = r"model\.layers\.1\.mlp\.(gate|up)_proj: its inputs .* are not all finite"
    with pytest.raises(CalibrationError, match=message):
        measured(broken, tmp_path / "kept")
    kept = {path.name.rpartition("-")[0] for path in (tmp_path / "kept").iterdir()}
    assert kept == {"importance-0", "states"}


def test_outputs_that_are_not_finite_name_the_block(source, tmp_path):
    """Break the layer whose outputs no other layer of the block reads."""
    broken = shutil.copytree(source, tmp_path / "broken")
    edit(broken, "model.layers.1.mlp.down_proj.weight", lambda rows: rows[3].fill_(math.inf))
    with pytest.raises(CalibrationError, match=r"model\.layers\.1: its outputs .* not all finite"):
        measured(broken, tmp_path / "kept")
