"""What a model with sketched experts does in training and generation, and what is refused."""

import json
import shutil

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from helpers.architectures import save_tiny
from helpers.decoded import decode, modules_of, save_decoded, tensors_of
from helpers.tuning import TOKENS, logits, train
from spallm_convert import (
    FormatError,
    OptionError,
    SketchConfig,
    convert,
    load_sketched,
    load_tables,
    save_tables,
    set_trainable,
    trainable_summary,
)
from spallm_convert.runtime import experts, sketch

# transformers 5.23 and PEFT still use former names.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

BLOCK = "model.layers.0.block_sparse_moe.experts"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny("MixtralForCausalLM", tmp_path_factory.mktemp("mixtral") / "source")


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("sketched") / "out"
    convert(source, target, SketchConfig(effort="fast", groups_per_row=2))
    return target


@pytest.fixture
def model(folder):
    return load_sketched(folder, dtype=torch.float32)


@pytest.fixture
def products(monkeypatch):
    """Collect the inputs and index maps of all sketched products."""
    found = []
    product = sketch.lut_linear

    def counted(x, index_map, *args, **kwargs):
        found.append((x, index_map))
        return product(x, index_map, *args, **kwargs)

    monkeypatch.setattr(sketch, "lut_linear", counted)
    return found


def test_only_experts_that_have_tokens_are_looked_up(monkeypatch, model, products):
    """In the model's own loop."""
    monkeypatch.setattr(experts, "can_group", lambda module: False)
    model(TOKENS[:1, :1])
    blocks, projections, chosen = 2, 4, 2
    assert len(products) == blocks * (projections + 2 * chosen)
    size = model.model.layers[0].mlp.experts.gate_up_proj[0].nbytes
    read = [m for _, m in products if m.untyped_storage().nbytes() > m.nbytes]
    assert len(read) == blocks * 2 * chosen
    assert max(m.nbytes for m in read) == size  # of one expert


def test_no_tokens_give_no_outputs(model, products):
    experts = model.model.layers[0].mlp.experts
    none = torch.zeros(0, 2, dtype=torch.long)
    found = experts(torch.zeros(0, 32), none, torch.zeros(0, 2))
    assert found.shape == (0, 32)
    assert not products


def test_other_implementations_of_experts_are_not_used(model):
    expected = logits(model)
    model.config._experts_implementation = "grouped_mm"
    assert torch.equal(logits(model), expected)


# The graph is broken at the experts, and torch itself looks at gradients of what goes in.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiled_blocks_compute_the_same(model):
    block = model.model.layers[0].mlp
    inputs = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(block, backend="eager")
    expected = block(inputs)
    expected.sum().backward()
    gradient = block.experts.down_proj_table.grad.clone()
    block.zero_grad()
    found = compiled(inputs)
    found.sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(block.experts.down_proj_table.grad, gradient)


def test_gradients_are_the_same_with_checkpointing(folder):
    found = []
    for reentrant in (None, False):
        model = load_sketched(folder, dtype=torch.float32).train()
        if reentrant is not None:
            kwargs = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model(TOKENS, labels=TOKENS).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any("down_proj_table" in name for name in found[0])
    torch.testing.assert_close(found[0], found[1])


def test_float32_tables_are_trained_in_bfloat16(folder):
    model = load_sketched(folder, dtype=torch.bfloat16)
    summary = set_trainable(model)
    table = model.model.layers[0].mlp.experts.down_proj_table
    assert table.dtype == torch.float32
    before = table.clone()
    with torch.no_grad():
        assert model(TOKENS).logits.dtype == torch.bfloat16
    train(model, steps=1)
    assert not torch.equal(table, before)
    assert summary.trained_tables == summary.tables


def test_tables_of_several_dtypes_are_saved_in_the_widest(model, tmp_path):
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj_table.data = experts.gate_up_proj_table.data.bfloat16()
    model.save_pretrained(tmp_path)
    dtypes = {value.dtype for name, value in tensors_of(tmp_path).items() if "_table" in name}
    assert dtypes == {torch.float32}
    load_sketched(tmp_path)


def test_patterns_choose_the_experts_of_a_block(model):
    summary = set_trainable(model, "*.0.block_sparse_moe.experts.*")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    path = "model.layers.0.mlp.experts"
    assert trained == {f"{path}.gate_up_proj_table", f"{path}.down_proj_table"}
    assert summary.trained_tables == 4 * (48 + 48 + 32) * 2 * 16
    set_trainable(model, ["*.1.block_sparse_moe.experts.*.w1", "*.1.block_sparse_moe.experts.?.w3"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"model.layers.1.mlp.experts.gate_up_proj_table"}


@pytest.mark.parametrize("pattern", [f"{BLOCK}.0.*", f"{BLOCK}.*.w1"])
def test_patterns_for_some_of_the_experts_are_refused(model, pattern):
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(OptionError, match="are one parameter of the model, expected patterns that"):
        set_trainable(model, pattern)
    assert before == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_summary_counts_the_weights_of_experts(model, folder):
    summary = trainable_summary(model)
    modules = list(modules_of(folder))
    assert summary.weights == sum(m["in_features"] * m["out_features"] for _, m, *_ in modules)
    assert summary.index_map_bytes == sum(index_map.nbytes for *_, index_map, _ in modules)


def test_several_sets_of_tables(model, tmp_path):
    base = logits(model)
    train(model, steps=1)
    first = logits(model)
    save_tables(model, tmp_path)
    load_tables(model, tmp_path, name="one")
    train(model, steps=1)
    second = logits(model)
    load_tables(model, tmp_path, name="two")
    assert torch.equal(logits(model), first)
    model.set_tables("one")
    assert torch.equal(logits(model), second)
    assert not torch.equal(first, base)


def test_lora_on_the_weights_of_experts_is_refused(model):
    config = LoraConfig(target_modules=[], target_parameters=["experts.down_proj"])
    with pytest.raises(OptionError, match="target_parameters with 'down_proj' needs a dense"):
        get_peft_model(model, config)


def test_lora_beside_experts_works(model):
    expected = logits(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    torch.testing.assert_close(logits(wrapped), expected)


def edited(folder, target, change):
    """Copy a checkpoint, and change its modules and its tensors."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    tensors = load_file(target / "model.safetensors")
    change(config["quantization_config"]["modules"], tensors)
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_experts_that_are_sketched_in_part_are_refused(folder, tmp_path):
    name = f"{BLOCK}.1.w2"

    def make_dense(modules, tensors):
        index_map, table = (tensors.pop(f"{name}.weight{end}") for end in ("", "_table"))
        tensors[f"{name}.weight"] = decode(modules.pop(name), index_map, table)[0].contiguous()

    target = edited(folder, tmp_path / "out", make_dense)
    with pytest.raises(FormatError, match=r"either all of them must be sketched, or none"):
        load_sketched(target)


def test_experts_with_other_groups_than_the_others_are_refused(folder, tmp_path):
    name = f"{BLOCK}.1.w2"

    def halve(modules, tensors):
        modules[name]["groups_per_row"] = 1
        tensors[f"{name}.weight_table"] = tensors[f"{name}.weight_table"][:, :1].contiguous()

    target = edited(folder, tmp_path / "out", halve)
    with pytest.raises(FormatError, match=r"are loaded as one weight, .* expected equal"):
        load_sketched(target)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_hashed_experts(name, tmp_path):
    """Rows are numbered in each stored module, so those of fused experts are counted through."""
    source = save_tiny(name, tmp_path / "source")
    config = SketchConfig(effort="fast", groups_per_row=2, mapping="hash", table_dtype="float32")
    convert(source, tmp_path / "out", config)
    model = load_sketched(tmp_path / "out", dtype=torch.float32)
    found = logits(model)
    decoded = save_decoded(tmp_path / "out", source, tmp_path / "decoded")
    expected = logits(getattr(transformers, name).from_pretrained(decoded))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    save_tables(model, tmp_path / "tables")
    load_tables(model, tmp_path / "tables")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_sketched(tmp_path / "again")), found)
    model.dequantize()
    torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-5)
