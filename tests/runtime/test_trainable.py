"""What is trained: all tables, some, norms too; and what the summary counts."""

import pytest
import torch

from spallm_convert import (
    OptionError,
    SketchConfig,
    convert,
    load_sketched,
    load_tables,
    save_tables,
    set_trainable,
    trainable_summary,
)


@pytest.fixture(scope="module")
def model(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("trainable") / "out"
    convert(tiny_llama.folder, out, SketchConfig(effort="fast", groups_per_row=2))
    return load_sketched(out, dtype=torch.float32)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_tables_by_pattern(model):
    set_trainable(model, "*.mlp.*")
    assert len(trained(model)) == 6
    assert all(".mlp." in name and name.endswith("weight_table") for name in trained(model))
    set_trainable(model, ["*.layers.0.*q_proj", "*.k_proj"])
    assert len(trained(model)) == 3
    set_trainable(model)
    assert len(trained(model)) == 14


def test_trained_tables_become_float32(tiny_llama, tmp_path):
    """One small step: lost in bfloat16, kept in float32, with activations as they were."""
    convert(tiny_llama.folder, tmp_path / "out", SketchConfig(effort="fast", groups_per_row=2))
    model = load_sketched(tmp_path / "out")
    tokens = torch.arange(2, 21)[None]
    before = model(tokens).logits
    set_trainable(model, "*.mlp.*", dtype=None)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    set_trainable(model, "*.mlp.*")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(model(tokens).logits, before)
    assert model(tokens).logits.dtype == torch.bfloat16


def test_some_tables_trained_make_a_checkpoint_of_one_dtype(tiny_llama, tmp_path):
    convert(tiny_llama.folder, tmp_path / "out")
    model = load_sketched(tmp_path / "out", dtype=torch.bfloat16)
    model(torch.arange(2, 21)[None]).logits.sum().backward()
    set_trainable(model, "*.mlp.*")
    assert all(parameter.grad is None for parameter in model.parameters())
    save_tables(model, tmp_path / "tables")
    load_tables(load_sketched(tmp_path / "out"), tmp_path / "tables")
    model.save_pretrained(tmp_path / "whole")
    load_sketched(tmp_path / "whole")


def test_norms_of_any_name(tiny_llama, tmp_path):
    convert(tiny_llama.folder, tmp_path / "out")
    model = load_sketched(tmp_path / "out")
    norm = model.model.norm
    norm.__class__ = type("RMSNormGated", (type(norm),), {})
    set_trainable(model, tables=False, norms=True)
    assert norm.weight.requires_grad


def test_norms(model):
    set_trainable(model, tables=False, norms=True)
    assert trained(model) == {
        "model.norm.weight",
        *(f"model.layers.{layer}.input_layernorm.weight" for layer in range(2)),
        *(f"model.layers.{layer}.post_attention_layernorm.weight" for layer in range(2)),
    }
    set_trainable(model)


def test_a_pattern_that_matches_nothing_is_an_error(model):
    with pytest.raises(
        OptionError, match=r"no sketched module matches 'mlp'; names are like model\."
    ):
        set_trainable(model, "mlp")
    assert len(trained(model)) == 14


def test_the_summary_counts_parameters_and_bytes(model):
    summary = set_trainable(model, "*.mlp.*", norms=True)
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    assert summary.trained_tables + summary.trained_others == sum(p.numel() for p in trainable)
    assert summary.trained_others == 5 * 64
    assert summary.index_map_bytes == sum(p.nbytes for p in parameters if p.dtype == torch.uint8)
    stored = summary.index_map_bytes + summary.table_bytes + summary.other_bytes
    buffers = sum(b.nbytes for b in model.buffers())
    assert stored == sum(p.nbytes for p in parameters) + buffers
    assert summary.gradient_bytes == sum(p.nbytes for p in trainable)
    assert summary.optimizer_bytes == 2 * summary.gradient_bytes
    assert summary.weights == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64)
    assert trainable_summary(model) == summary
    text = str(summary)
    assert f"trainable: {summary.trained_tables + 320:,} parameters" in text
    assert "AdamW" in text
    set_trainable(model)
