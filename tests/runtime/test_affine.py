"""Affine sets: a shift and a scale for each table of the base, trained, saved and loaded."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.tuning import logits, train
from spallm_convert import (
    FormatError,
    OptionError,
    load_sketched,
    load_tables,
    save_tables,
    set_trainable,
    table_sets,
    trainable_summary,
)
from spallm_formats import TABLES_FILE, TABLES_METADATA_FILE

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model(sketched_llama):
    return load_sketched(sketched_llama)


@pytest.fixture(scope="module")
def tuned(sketched_llama, tmp_path_factory):
    """A folder with an affine set, and the logits of the model that it was saved from."""
    trained = load_sketched(sketched_llama)
    set_trainable(trained, affine=True)
    train(trained)
    return save_tables(trained, tmp_path_factory.mktemp("affine") / "set"), logits(trained)


def layer_of(model):
    return model.get_submodule(Q_PROJ)


def test_new_numbers_change_nothing(model):
    before = logits(model)
    set_trainable(model, affine=True)
    assert torch.equal(logits(model), before)


def test_shifts_and_scales_are_all_that_is_trained(model):
    summary = set_trainable(model, affine=True)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 2 * 14
    assert all(name.endswith(("weight_shift", "weight_scale")) for name in names)
    assert layer_of(model).weight_shift.shape == layer_of(model).weight_table.shape[:2]
    assert summary.trained_tables == 0
    assert summary.trained_affine * 16 == summary.tables * 2  # two numbers for 16 entries
    assert trainable_summary(model) == summary
    assert f"shifts, scales {summary.trained_affine:,}\n" in str(summary)
    set_trainable(model)
    assert trainable_summary(model).trained_affine == 0
    set_trainable(model, "*.mlp.*", affine=True)
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 6


def test_products_and_gradients_are_those_of_explicit_tables(model):
    set_trainable(model, affine=True)
    layer = layer_of(model)
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight_shift.normal_(std=0.1)
        layer.weight_scale.normal_(mean=1, std=0.1)
    x = torch.randn(5, layer.in_features, requires_grad=True)
    shift, scale, table = (
        getattr(layer, name).detach().double().requires_grad_()
        for name in ("weight_shift", "weight_scale", "weight_table")
    )
    explicit = shift[..., None] + scale[..., None] * table
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        plain.weight_shift.zero_()
        plain.weight_scale.fill_(1)
    plain.weight_table.data = explicit.detach().float()
    plain.weight_table.requires_grad_()
    y, expected = layer(x), plain(x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(layer.dense_weight(), plain.dense_weight())
    y.square().sum().backward()
    expected.square().sum().backward()
    explicit.backward(plain.weight_table.grad.double())
    torch.testing.assert_close(layer.weight_shift.grad, shift.grad.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight_scale.grad, scale.grad.float(), rtol=1e-4, atol=1e-4)


def test_the_file_holds_the_numbers_alone(tuned):
    folder, _ = tuned
    tensors = load_file(folder / TABLES_FILE)
    assert len(tensors) == 2 * 14
    assert tensors[f"{Q_PROJ}.weight_shift"].shape == (64, 2)
    assert tensors[f"{Q_PROJ}.weight_scale"].shape == (64, 2)
    document = json.loads((folder / TABLES_METADATA_FILE).read_text())
    assert document["format_version"] == 2
    assert document["kind"] == "affine"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_and_numbers_give_the_tuned_models_logits(sketched_llama, tmp_path, dtype):
    trained = load_sketched(sketched_llama, dtype=dtype)
    before = logits(trained)
    set_trainable(trained, affine=True)
    train(trained)
    after = logits(trained)
    assert not torch.equal(after, before)
    saved = save_tables(trained, tmp_path / "set")
    live = load_sketched(sketched_llama, dtype=dtype, tables=saved)
    assert torch.equal(logits(live), after)
    assert not any(p.requires_grad for n, p in live.named_parameters() if n.endswith("_table"))
    live.set_tables("base")
    assert torch.equal(logits(live), before)


def test_full_and_affine_sets_are_exchanged(sketched_llama, tuned, tmp_path):
    folder, affine = tuned
    full = load_sketched(sketched_llama)
    train(full, seed=1)
    save_tables(full, tmp_path / "full")
    live = load_sketched(sketched_llama)
    expected = {"base": logits(live), "full": logits(full), "affine": affine, "also": affine}
    load_tables(live, folder, name="affine")
    load_tables(live, tmp_path / "full", name="full")
    load_tables(live, folder, name="also", activate=False)
    for name in ("affine", "base", "full", "also", "full", "base", "affine"):
        live.set_tables(name)
        assert torch.equal(logits(live), expected[name])
    assert table_sets(live) == ["affine", "also", "base", "full"]


def test_full_tables_loaded_first_stay_as_they_are(sketched_llama, tuned, tmp_path):
    folder, _ = tuned
    full = load_sketched(sketched_llama)
    train(full, seed=1)
    save_tables(full, tmp_path / "full")
    live = load_sketched(sketched_llama, tables=tmp_path / "full")
    load_tables(live, folder, name="affine")
    live.set_tables("base")
    set_trainable(live, affine=True)  # of the base itself
    train(live)
    live.set_tables("tuned")
    assert torch.equal(logits(live), logits(full))


def test_a_loaded_set_is_trained_and_saved_again(sketched_llama, tuned, tmp_path):
    folder, before = tuned
    live = load_sketched(sketched_llama, tables=folder)
    set_trainable(live, affine=True)
    train(live, seed=1)
    after = logits(live)
    assert not torch.equal(after, before)
    saved = save_tables(live, tmp_path / "again")
    assert (saved / TABLES_FILE).stat().st_size == (folder / TABLES_FILE).stat().st_size
    assert torch.equal(logits(load_sketched(sketched_llama, tables=saved)), after)
    live.set_tables("base")
    assert torch.equal(logits(live), logits(load_sketched(sketched_llama)))


def test_what_is_trained_follows_the_kind_of_the_set(sketched_llama, tuned, model, tmp_path):
    folder, _ = tuned
    save_tables(model, tmp_path / "full")
    load_tables(model, tmp_path / "full", name="full")
    load_tables(model, folder, name="affine")
    layer = layer_of(model)
    assert [layer.weight_table.requires_grad, layer.weight_shift.requires_grad] == [False, True]
    model.set_tables("full")
    assert [layer.weight_table.requires_grad, layer.weight_shift.requires_grad] == [True, False]


def test_training_the_tables_of_an_affine_set_saves_full_tables(sketched_llama, tuned, tmp_path):
    folder, _ = tuned
    live = load_sketched(sketched_llama, tables=folder)
    set_trainable(live)
    train(live, seed=1)
    saved = save_tables(live, tmp_path / "full")
    assert f"{Q_PROJ}.weight_table" in load_file(saved / TABLES_FILE)
    again = load_sketched(sketched_llama, tables=saved)
    torch.testing.assert_close(logits(again), logits(live), rtol=1e-5, atol=1e-5)
    live.set_tables("base")
    assert torch.equal(logits(live), logits(load_sketched(sketched_llama)))


def test_the_base_of_affine_sets_is_not_trained(tuned, model):
    folder, _ = tuned
    load_tables(model, folder, name="small", activate=False)
    message = "would change the affine sets small, which use them; activate another set"
    with pytest.raises(OptionError, match=message):
        set_trainable(model)
    with pytest.raises(OptionError, match=message):
        train(model)
    set_trainable(model, affine=True)
    train(model)


def test_numbers_for_other_tables_are_refused(sketched_llama, tuned, tmp_path):
    folder, _ = tuned
    other = load_sketched(sketched_llama)
    train(other)
    with pytest.raises(FormatError, match=r"affine numbers for out with the tables \w{12}, but"):
        load_tables(other, folder)
    assert not hasattr(layer_of(other), "weight_shift")
    load_tables(load_sketched(sketched_llama, dtype=torch.bfloat16), folder)  # tables as stored


def test_an_ordinary_checkpoint_of_an_affine_set_has_full_tables(sketched_llama, tuned, tmp_path):
    folder, expected = tuned
    live = load_sketched(sketched_llama, tables=folder)
    live.save_pretrained(tmp_path / "whole")
    again = load_sketched(tmp_path / "whole")
    assert not hasattr(layer_of(again), "weight_shift")
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(live), expected)


def test_a_checkpoint_of_trainer_is_gone_on_with(sketched_llama, tuned, tmp_path):
    """It holds full tables, and so does what is saved after it was loaded."""
    folder, expected = tuned
    load_sketched(sketched_llama, tables=folder).save_pretrained(tmp_path / "checkpoint")
    state = load_file(tmp_path / "checkpoint/model.safetensors")
    live = load_sketched(sketched_llama)
    set_trainable(live, affine=True)
    train(live, seed=1)
    live.load_state_dict(state, strict=False)
    assert torch.equal(logits(live), expected)
    train(live, seed=2)
    save_tables(live, tmp_path / "set")
    again = load_sketched(sketched_llama, tables=tmp_path / "set")
    torch.testing.assert_close(logits(again), logits(live), rtol=1e-5, atol=1e-5)
    own = live.state_dict()
    set_trainable(again, affine=True)
    again.load_state_dict(own)  # numbers and tables
    assert torch.equal(logits(again), logits(live))


def test_copies_and_dense_models_are_affine_too(sketched_llama, tuned):
    folder, expected = tuned
    live = load_sketched(sketched_llama, tables=folder)
    other = copy.deepcopy(live)
    live.set_tables("base")
    assert torch.equal(logits(other), expected)
    dense = other.dequantize()
    assert type(layer_of(dense)) is nn.Linear
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)


def test_every_problem_of_an_affine_file_is_listed(model, tuned, tmp_path):
    folder, _ = tuned
    tensors = load_file(folder / TABLES_FILE)
    names = sorted(tensors)
    del tensors[names[0]]
    tensors[names[1]] = tensors[names[1]][:1]
    tensors[names[2]] = tensors[names[2]].double()
    tensors[f"{Q_PROJ}.weight_table"] = layer_of(model).weight_table.detach()
    (tmp_path / TABLES_METADATA_FILE).write_bytes((folder / TABLES_METADATA_FILE).read_bytes())
    save_file(tensors, tmp_path / TABLES_FILE, metadata={"format": "pt"})
    with pytest.raises(FormatError) as caught:
        load_tables(model, tmp_path)
    for expected in (
        f"{names[0]} is missing",
        f"{names[1]} has the shape [1, 2], the model expects [",
        "shifts and scales have several dtypes, expected one: F32, F64",
        f"'{Q_PROJ}.weight_table': an affine set has shifts and scales in place of tables",
    ):
        assert expected in "\n".join(caught.value.problems)
    assert table_sets(model) == ["base"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(model, tuned, tmp_path, value):
    folder, _ = tuned
    tensors = load_file(folder / TABLES_FILE)
    tensors[f"{Q_PROJ}.weight_scale"][0, 0] = value
    (tmp_path / TABLES_METADATA_FILE).write_bytes((folder / TABLES_METADATA_FILE).read_bytes())
    save_file(tensors, tmp_path / TABLES_FILE, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"weight_scale has values that are not finite"):
        load_tables(model, tmp_path)


def test_a_compiled_layer_computes_with_the_numbers(model, tuned):
    folder, _ = tuned
    layer, x = layer_of(model), torch.ones(1, 64, dtype=torch.bfloat16)
    layer.compile(backend="eager", fullgraph=True)
    before = layer(x)
    load_tables(model, folder)
    after = layer(x)
    torch.testing.assert_close(after, x @ layer.dense_weight().to(x.dtype).T)
    assert not torch.equal(after, before)
    model.set_tables("base")
    assert torch.equal(layer(x), before)
