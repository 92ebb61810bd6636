"""Running models block by block gives the same as running them whole, for many architectures."""

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.blocks import linear_paths, open_blocks, run_through
from spallm_convert import CalibrationError, SketchConfig
from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.sketch.plan import make_plan
from spallm_convert.source.locate import find_here
from spallm_convert.source.skeleton import build_empty, by_model_name

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
#: Architectures whose blocks differ in their arguments, return tuples, have biases, or run
#: attention and MLP in parallel.
ARCHITECTURES = {
    "llama": SIZES,
    "qwen3": SIZES | {"head_dim": 16},
    "gemma3_text": SIZES | {"head_dim": 16, "sliding_window": 8},
    "gpt_neox": {k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
    "opt": {
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 128,
        "word_embed_proj_dim": 64,
    },
    "phi": SIZES,
    "gemma4_text": SIZES
    | {"head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 0}
    | {"num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 3},
    "diffllama": SIZES,
    "granitemoe": SIZES,
    "gemma4_unified_text": SIZES
    | {"head_dim": 16, "global_head_dim": 16, "layer_types": ["full_attention"] * 3},
}


def save_model(folder, architecture, **changes):
    from transformers import AutoConfig

    torch.manual_seed(0)
    options = ARCHITECTURES[architecture] | {"tie_word_embeddings": False} | changes
    config = AutoConfig.for_model(architecture, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_going_through_the_blocks_is_running_the_model(architecture, tmp_path):
    assert_blocks_are_the_model(save_model(tmp_path / "model", architecture))


def assert_blocks_are_the_model(folder):
    tokens = torch.randint(2, 128, (4, 24))
    before = torch.get_rng_state()
    blocks = open_blocks(folder, tokens)
    assert torch.equal(torch.get_rng_state(), before)
    hidden = list(blocks.inputs)
    assert len(blocks) == 3
    with torch.no_grad():
        for number in range(len(blocks)):
            block = blocks.load(number)
            hidden = [blocks.run(number, block, states) for states in hidden]
            blocks.unload(number)
            assert all(p.is_meta for p in block.parameters())

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = []
    last = model.get_submodule(blocks.path_of(2))
    last.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(tokens)
    expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert torch.allclose(torch.cat(hidden), expected, rtol=1e-5, atol=1e-6)


def test_keys_and_values_of_blocks_before_are_not_to_be_had(tmp_path):
    folder = save_model(tmp_path / "model", "gemma4_unified_text", num_kv_shared_layers=1)
    with pytest.raises(CalibrationError, match=r"last 1 blocks use keys and values of earlier"):
        open_blocks(folder, torch.randint(2, 128, (4, 24)))


class Twice(torch.nn.ModuleList):
    def __iter__(self):
        yield from super().__iter__()
        yield from super().__iter__()


class First(torch.nn.ModuleList):
    def __iter__(self):
        yield next(super().__iter__())


class Scaled(torch.nn.ModuleList):
    def __iter__(self):
        for number, block in enumerate(super().__iter__()):
            yield lambda hidden, number=number, block=block, **rest: block(
                (1 + number) * hidden, **rest
            )


def open_changed(kind, folder):
    """Open the blocks of a Llama whose list of blocks is of another class."""
    checkpoint = find_here(str(save_model(folder / "model", "llama"))).open(folder)
    linears = linear_paths(checkpoint)
    model = build_empty(checkpoint.folder, checkpoint.config)
    model.model.layers.__class__ = kind
    return Blocks(model, checkpoint.tensors, linears, torch.randint(2, 128, (4, 24)), batch=2)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Twice, "runs the blocks model.layers more than once"),
        (Scaled, "directly to the next"),
    ],
)
def test_models_that_do_other_than_pass_through_their_blocks_are_refused(kind, message, tmp_path):
    with pytest.raises(CalibrationError, match=message):
        open_changed(kind, tmp_path)


def test_blocks_that_are_not_called_are_left_out(tmp_path):
    """Mllama skips blocks for images; the last one may be one of them."""
    blocks = open_changed(First, tmp_path)
    assert len(blocks) == 1
    assert blocks.path_of(0) == "model.layers.0"
    assert blocks.next is None


def test_blocks_behind_the_last_call_are_missed_if_it_is_not_known_to_be_the_last(
    monkeypatch, tmp_path
):
    """Call the model of the blocks without its hooks."""
    monkeypatch.setattr(transformers.LlamaModel, "__call__", transformers.LlamaModel.forward)
    with pytest.raises(CalibrationError, match=r"model\.layers cannot be run: .* only 1 of 3"):
        open_changed(First, tmp_path)


def test_embeddings_that_are_no_numbers_are_passed_on(tiny_llama, tmp_path):
    """Check that opening raises no error: the layers that read the values report them."""
    folder = shutil.copytree(tiny_llama.folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    blocks = open_blocks(folder, torch.randint(2, 128, (4, 24)))
    assert all(hidden.isnan().all() for hidden in blocks.inputs)


def test_what_else_a_config_asks_for_is_not_asked_of_blocks(tmp_path):
    folder = save_model(
        tmp_path / "model", "granitemoe", num_local_experts=4, output_router_logits=True
    )
    tokens = torch.randint(2, 128, (4, 24))
    blocks = open_blocks(folder, tokens)
    with blocks.predicting():
        assert blocks.logits(tokens[:2], blocks.inputs[0]).shape == (2, 24, 128)


def test_buffers_that_are_stored_are_read(tmp_path):
    """Use Gemma 4, which has a trained scalar per block that is a buffer, not a parameter."""
    folder = save_model(tmp_path / "model", "gemma4_text")
    tensors = load_file(folder / "model.safetensors")
    scalars = [name for name in tensors if name.endswith("layer_scalar")]
    assert len(scalars) == 3
    save_file(
        tensors | {name: torch.full_like(tensors[name], 0.5) for name in scalars},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert_blocks_are_the_model(folder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_the_assembled_model_is_the_dense_one(architecture, tied, tmp_path):
    """Include GPT-NeoX, whose head is stored as embed_out and called lm_head in the model."""
    folder = save_model(tmp_path / "model", architecture, tie_word_embeddings=tied)
    if architecture == "gpt_neox" and not tied:
        assert "embed_out.weight" in load_file(folder / "model.safetensors")
    tokens = torch.randint(2, 128, (2, 16))
    blocks = open_blocks(folder, tokens)
    hidden = run_through(blocks)
    with torch.no_grad():
        model = blocks.assemble(lambda path, layer: None)
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        assert torch.equal(model(tokens).logits, expected)
        assert torch.equal(blocks.logits(tokens, hidden), expected)


def test_tensors_get_the_names_and_only_those_that_the_model_has_them_by(tmp_path):
    """Use Mixtral, whose experts are stored apart and fused on loading; others are renamed."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 2, "vocab_size": 128}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert any("experts.1." in name for name in stored)
    found = by_model_name(model, stored)
    own = model.state_dict()
    assert [name for name in own if name not in found] == [n for n in own if "mlp.experts." in n]
    assert all(torch.equal(tensor, own[name]) for name, tensor in found.items())
    bare = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
    assert by_model_name(model, bare).keys() == found.keys()


def test_blocks_that_cannot_be_found_or_read(tiny_llama):
    source = tiny_llama.folder
    checkpoint = find_here(str(source)).open(source)
    tokens = torch.randint(2, 128, (2, 8))
    plan = make_plan(checkpoint, SketchConfig(effort="fast", groups_per_row=1))
    model = build_empty(source, checkpoint.config)
    with pytest.raises(CalibrationError, match="must lie in a list of blocks, found lm_head in no"):
        Blocks(model, checkpoint.tensors, ["lm_head"], tokens, batch=1)
    fewer = {n: t for n, t in checkpoint.tensors.items() if "layers.0.mlp.up_proj" not in n}
    with pytest.raises(CalibrationError, match=r"no tensor for model\.layers\.0\.mlp\.up_proj"):
        Blocks(build_empty(source, checkpoint.config), fewer, plan.by_path, tokens, batch=1)


def test_inputs_that_are_taken_are_forgotten(source):
    blocks = open_blocks(source, torch.randint(2, 126, (4, 8)))
    inputs = blocks.inputs
    assert blocks.take_inputs() is inputs
    assert len(inputs) == 2
    assert blocks.inputs == []
