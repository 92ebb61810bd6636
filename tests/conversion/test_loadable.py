"""Sources and checkpoints that transformers cannot load are refused, from headers alone."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.architectures import available, save_tiny
from helpers.calibration import contents
from helpers.tiny_models import save_tiny_llama
from spallm_convert import SketchConfig, SourceError, convert, load_sketched, plan_conversion
from spallm_convert.conversion.verify import verify

NORM = "model.norm.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def source(tiny_llama, tmp_path):
    """A copy of a model, to be broken."""
    return shutil.copytree(tiny_llama.folder, tmp_path / "source")


def refused(source, output):
    """Return the message with which both a plan and a conversion refuse a source."""
    messages = []
    for run in (lambda: plan_conversion(source), lambda: convert(source, output)):
        with pytest.raises(SourceError) as caught:
            run()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert not output.exists()
    return messages[0]


@pytest.mark.parametrize("name", [NORM, QUERY, "lm_head.weight", "model.embed_tokens.weight"])
def test_a_source_without_a_tensor_is_refused(source, tmp_path, name):
    edit_tensors(source, lambda tensors: tensors.pop(name))
    message = refused(source, tmp_path / "out")
    assert f"no tensor for {name}, expected by LlamaForCausalLM" in message
    assert "\n" not in message


def test_many_missing_tensors_are_counted(source, tmp_path):
    edit_config(source, num_hidden_layers=3)
    message = refused(source, tmp_path / "out")
    assert "model.layers.2.input_layernorm.weight" in message
    assert "and 10 more" in message  # seven weights, three biases and two norms in all


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 256}, "'model.embed_tokens.weight' is [128, 64], expected [256, 64]"),
        ({"num_hidden_layers": 1}, "no block for model.layers.1.input_layernorm.weight, "),
    ],
)
def test_a_config_that_does_not_belong_to_the_weights(source, tmp_path, changes, named):
    edit_config(source, **changes)
    message = refused(source, tmp_path / "out")
    assert named in message
    assert "use the config.json that belongs to these weights" in message


@pytest.mark.parametrize("name", ["x.weight_table", QUERY + "_table"])
def test_names_of_sketch_tables_are_reserved(source, tmp_path, name):
    edit_tensors(source, lambda tensors: tensors.update({name: torch.zeros(4, 4)}))
    assert f"found '{name}', but only sketch tables" in refused(source, tmp_path / "out")


def test_one_weight_under_two_names(source, tmp_path):
    other = QUERY.removeprefix("model.")
    edit_tensors(source, lambda tensors: tensors.update({other: tensors[QUERY].clone()}))
    assert f"'{other}' and '{QUERY}' are the same weight" in refused(source, tmp_path / "out")


EXPERTS = {
    "MixtralForCausalLM": ("model.layers.0.block_sparse_moe.experts.", (".w1.weight",)),
    "Qwen3MoeForCausalLM": (
        "model.layers.1.mlp.experts.",
        (".down_proj.weight", ".gate_proj.weight", ".up_proj.weight"),
    ),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_a_block_without_one_of_its_experts(name, tmp_path):
    source = save_tiny(name, tmp_path / "source")
    start, ends = EXPERTS[name]
    lost = [f"{start}2{end}" for end in ends]
    edit_tensors(source, lambda tensors: [tensors.pop(name) for name in lost])
    message = refused(source, tmp_path / "out")
    assert f": experts without a tensor: {', '.join(lost)}; use the config.json that" in message


def test_kinds_of_weights_with_different_numbers_of_experts(tmp_path):
    """LongCat has six experts, two of which pass their input on and lack one of the weights."""
    name = "LongcatFlashForCausalLM"
    if not available(name):
        pytest.skip(f"transformers has no {name}")
    source = save_tiny(name, tmp_path / "source")
    start = "model.layers.0.mlp.experts"
    plan = plan_conversion(source, SketchConfig(effort="fast", groups_per_row=1))
    assert f"{start}.5.up_proj" in plan.layers
    assert f"{start}.4.down_proj" not in plan.layers
    lost = [f"{start}.1.down_proj.weight", f"{start}.4.up_proj.weight"]
    edit_tensors(source, lambda tensors: [tensors.pop(name) for name in lost])
    message = refused(source, tmp_path / "out")
    assert f": experts without a tensor: {', '.join(lost)}; use the config.json that" in message


def test_a_config_with_more_experts_than_are_stored(tmp_path):
    source = save_tiny("MixtralForCausalLM", tmp_path / "source")
    edit_config(source, num_local_experts=5)
    message = refused(source, tmp_path / "out")
    assert ".experts.4.w1.weight, " in message
    assert "and 3 more" in message  # three projections in each of two blocks


def test_tied_weights_and_further_tensors_are_not_refused(tmp_path):
    source = save_tiny_llama(tmp_path / "tied", tie_word_embeddings=True).folder
    assert "lm_head.weight" not in load_file(source / "model.safetensors")
    edit_tensors(source, lambda tensors: tensors.update({"further": torch.zeros(3)}))
    convert(source, tmp_path / "out")
    assert verify(tmp_path / "out") == []
    load_sketched(tmp_path / "out")


def test_blocks_that_predict_further_tokens_are_not_refused(source):
    edit_config(source, num_hidden_layers=1, num_nextn_predict_layers=1)
    plan_conversion(source)


# tests/conversion/test_reach.py takes these and all others through a whole conversion.
@pytest.mark.parametrize(
    "name",
    [
        "LlamaModel",
        "Qwen3MoeForCausalLM",
        "DeepseekV3ForCausalLM",
        "GPTNeoXForCausalLM",
        "BloomForCausalLM",
        "JambaForCausalLM",
        "BartForConditionalGeneration",
        "BertForPreTraining",
        "Dinov2Model",
        "CLIPModel",
        "Gemma3ForConditionalGeneration",
    ],
)
def test_models_that_transformers_saved_are_not_refused(name, tmp_path):
    plan_conversion(save_tiny(name, tmp_path), SketchConfig(effort="fast", groups_per_row=1))


def test_nothing_is_printed_and_no_state_changes(source, capsys):
    edit_config(source, vocab_size=256)
    state, bars = torch.get_rng_state(), transformers.utils.logging.is_progress_bar_enabled()
    with pytest.raises(SourceError):
        plan_conversion(source)
    assert capsys.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), state)
    assert transformers.utils.logging.is_progress_bar_enabled() == bars


@pytest.fixture(scope="module")
def sketched(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sketched") / "out"
    convert(tiny_llama.folder, folder)
    return folder


def spoil_missing(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(NORM))


def spoil_size(folder):
    edit_tensors(folder, lambda tensors: tensors.update({NORM: torch.zeros(32)}))


def spoil_vocabulary(folder):
    edit_config(folder, vocab_size=256)


def spoil_architecture(folder):
    edit_config(folder, architectures=["NoSuchModel"], model_type="no-such-model")


def spoil_names(folder):
    edit_config(folder, architectures=None)


def spoil_heads(folder):
    edit_config(folder, num_attention_heads="many")


def spoil_shape(folder):
    """Make the columns of a layer fewer than the model's."""
    config = json.loads((folder / "config.json").read_text())
    name = QUERY.removesuffix(".weight")
    config["quantization_config"]["modules"][name]["in_features"] = 60
    (folder / "config.json").write_text(json.dumps(config))


def spoil_alias(folder):
    """List a module a second time, under the name without the base model's prefix."""
    config = json.loads((folder / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    name = QUERY.removesuffix(".weight")
    other = name.removeprefix("model.")
    modules[other] = modules[name]
    (folder / "config.json").write_text(json.dumps(config))

    def repeat(tensors):
        for suffix in (".weight", ".weight_table"):
            tensors[other + suffix] = tensors[name + suffix].clone()

    edit_tensors(folder, repeat)


SPOILS = [value for name, value in list(globals().items()) if name.startswith("spoil_")]


@pytest.mark.parametrize("spoil", SPOILS)
def test_what_verify_refuses_does_not_load(sketched, tmp_path, spoil):
    folder = shutil.copytree(sketched, tmp_path / "out")
    spoil(folder)
    hashes = [problem for problem in verify(folder) if "SHA-256" in problem]
    others = [problem for problem in verify(folder) if problem not in hashes]
    assert hashes
    assert len([other for other in others if "padding bits" not in other]) == 1, others
    with pytest.raises(Exception):  # noqa: B017, PT011  whatever transformers raises
        load_sketched(folder)


def test_verify_runs_no_code_of_the_model(sketched, tmp_path):
    folder = shutil.copytree(sketched, tmp_path / "out")
    (folder / "code.py").write_text("raise SystemExit('this code was run')")
    auto_map = {"AutoModelForCausalLM": "code.OwnModel", "AutoConfig": "code.OwnConfig"}
    edit_config(folder, architectures=["OwnModel"], model_type="own", auto_map=auto_map)
    (problem,) = verify(folder)
    assert problem.startswith("config.json: its SHA-256")


def test_what_verify_accepts_loads(sketched):
    before = contents(sketched)
    assert verify(sketched) == []
    load_sketched(sketched)
    assert contents(sketched) == before
