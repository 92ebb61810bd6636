"""Several sets of tables in one model: whatever is trained belongs to the active set."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from helpers.tuning import logits, train
from spallm_convert import (
    OptionError,
    load_sketched,
    load_tables,
    save_tables,
    set_tables,
    set_trainable,
    table_sets,
)


@pytest.fixture
def model(sketched_llama):
    return load_sketched(sketched_llama)


def test_several_sets_are_kept_and_the_base_is_untouched(sketched_llama, model, tmp_path):
    before, found = logits(model), {}
    for seed, name in enumerate(["first", "second"], 1):
        tuned = load_sketched(sketched_llama)
        train(tuned, seed=seed)
        found[name] = logits(tuned)
        save_tables(tuned, tmp_path / name)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    load_tables(model, tmp_path / "first", name="first")
    load_tables(model, tmp_path / "second", name="second", activate=False)
    assert table_sets(model) == ["first", "base", "second"]
    for name, expected in [*found.items(), ("base", before), ("first", found["first"])]:
        set_tables(model, name)
        assert torch.equal(logits(model), expected)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters


def test_training_an_active_set_changes_that_set_only(model, tmp_path):
    before = logits(model)
    save_tables(model, tmp_path / "same")
    load_tables(model, tmp_path / "same", name="mine")
    train(model)
    mine = logits(model)
    model.set_tables("base")
    assert torch.equal(logits(model), before)
    model.set_tables("mine")
    assert torch.equal(logits(model), mine)


def test_a_set_of_the_same_name_is_replaced(model, tmp_path):
    save_tables(model, tmp_path / "old")
    before = logits(model)
    train(model)
    after = logits(model)
    save_tables(model, tmp_path / "new")
    load_tables(model, tmp_path / "new")
    load_tables(model, tmp_path / "old")
    assert torch.equal(logits(model), before)
    model.set_tables("base")
    assert torch.equal(logits(model), after)
    assert table_sets(model) == ["base", "tuned"]


def test_norms_that_were_trained_travel_with_the_tables(sketched_llama, tmp_path):
    tuned = load_sketched(sketched_llama)
    set_trainable(tuned, norms=True)
    train(tuned)
    save_tables(tuned, tmp_path / "tuned")
    plain = load_sketched(sketched_llama)
    train(plain, seed=1)
    save_tables(plain, tmp_path / "plain")

    live = load_sketched(sketched_llama)
    before = logits(live)
    load_tables(live, tmp_path / "plain", name="plain")
    load_tables(live, tmp_path / "tuned", name="tuned")
    assert torch.equal(logits(live), logits(tuned))
    live.set_tables("plain")  # which has no norms: those of the base
    assert torch.equal(logits(live), logits(plain))
    live.set_tables("base")
    assert torch.equal(logits(live), before)


@pytest.mark.parametrize("order", ["norms first", "set first"])
def test_norms_trained_with_a_set_are_of_that_set_alone(sketched_llama, tmp_path, order):
    model = load_sketched(sketched_llama, dtype=torch.float32)
    save_tables(model, tmp_path / "plain")
    with_norms = load_sketched(sketched_llama, dtype=torch.float32)
    set_trainable(with_norms, norms=True)
    train(with_norms, seed=1)
    save_tables(with_norms, tmp_path / "other")

    before = logits(model)
    load_tables(model, tmp_path / "other", name="other", activate=False)
    if order == "norms first":
        set_trainable(model, norms=True)
        load_tables(model, tmp_path / "plain", name="mine")
    else:
        load_tables(model, tmp_path / "plain", name="mine")
        set_trainable(model, norms=True)
    train(model, seed=2)
    mine = logits(model)
    for name, expected in [("base", before), ("other", logits(with_norms)), ("mine", mine)]:
        model.set_tables(name)
        assert torch.equal(logits(model), expected)
    save_tables(model, tmp_path / "mine")
    again = load_sketched(sketched_llama, dtype=torch.float32, tables=tmp_path / "mine")
    assert torch.equal(logits(again), mine)


def test_copies_have_sets_of_their_own(model, tmp_path):
    save_tables(model, tmp_path / "same")
    load_tables(model, tmp_path / "same")
    other = copy.deepcopy(model)
    other.set_tables("base")
    assert table_sets(model)[0] == "tuned"
    assert table_sets(other)[0] == "base"


def test_names_of_sets_are_checked(model, tmp_path):
    with pytest.raises(
        OptionError, match="no set of tables is called 'tuned', the model has base; load it"
    ):
        model.set_tables("tuned")
    with pytest.raises(OptionError, match="'base' is reserved for the tables"):
        load_tables(model, tmp_path, name="base")


def test_changing_sets_through_a_compiled_model(sketched_llama, tmp_path):
    model = load_sketched(sketched_llama)
    before = logits(model)
    train(model)
    save_tables(model, tmp_path / "tuned")
    model = load_sketched(sketched_llama)
    compiled = torch.compile(model, backend="eager")
    load_tables(compiled, tmp_path / "tuned")
    assert not torch.equal(logits(model), before)
    compiled.set_tables("base")
    assert torch.equal(logits(model), before)


def compiled(model):
    model.lm_head.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "prepared",
    [
        lambda model: model,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        compiled,
    ],
    ids=["as it is", "copied", "pickled", "compiled"],
)
def test_a_head_that_is_trained_with_a_set_belongs_to_that_set(sketched_llama, tmp_path, prepared):
    """Unfrozen by hand after the set was activated."""
    model = load_sketched(sketched_llama, dtype=torch.float32)
    save_tables(model, tmp_path / "plain")
    load_tables(model, tmp_path / "plain", name="other", activate=False)
    load_tables(model, tmp_path / "plain", name="mine")
    model = prepared(model)
    before, head = logits(model), model.lm_head.weight.detach().clone()
    model.lm_head.requires_grad_(True)
    train(model)
    mine, trained = logits(model), model.lm_head.weight.detach().clone()
    assert not torch.equal(trained, head)
    for name in ("base", "other"):
        model.set_tables(name)
        assert torch.equal(model.lm_head.weight, head)
        assert torch.equal(logits(model), before)
    model.set_tables("mine")
    assert torch.equal(model.lm_head.weight, trained)
    assert torch.equal(logits(model), mine)
    save_tables(model, tmp_path / "mine")
    again = load_sketched(sketched_llama, dtype=torch.float32, tables=tmp_path / "mine")
    assert torch.equal(logits(again), logits(model.eval()))


def test_a_head_that_is_frozen_before_the_step_belongs_to_the_set_too(sketched_llama, tmp_path):
    model = load_sketched(sketched_llama, dtype=torch.float32)
    save_tables(model, tmp_path / "plain")
    load_tables(model, tmp_path / "plain", name="mine")
    head = model.lm_head.weight.detach().clone()
    optimizer = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    model.lm_head.requires_grad_(True)
    model(torch.arange(2, 21)[None]).logits.sum().backward()
    model.lm_head.requires_grad_(False)
    optimizer.step()
    assert not torch.equal(model.lm_head.weight, head)
    model.set_tables("base")
    assert torch.equal(model.lm_head.weight, head)


def test_a_step_leaves_the_head_its_memory_and_gradient(sketched_llama, tmp_path):
    model = load_sketched(sketched_llama, dtype=torch.float32)
    save_tables(model, tmp_path / "plain")
    load_tables(model, tmp_path / "plain", name="mine")
    model.lm_head.requires_grad_(True)
    memory = model.lm_head.weight.data_ptr()
    train(model, steps=1)
    assert model.lm_head.weight.data_ptr() == memory  # a captured graph may hold the address
    assert model.lm_head.weight.grad is not None


def test_a_frozen_parameter_is_shared_by_all_sets(sketched_llama, tmp_path):
    model = load_sketched(sketched_llama, dtype=torch.float32)
    save_tables(model, tmp_path / "plain")
    load_tables(model, tmp_path / "plain", name="mine")
    memory = model.model.embed_tokens.weight.data_ptr()
    train(model)
    model.set_tables("base")
    assert model.model.embed_tokens.weight.data_ptr() == memory


def test_training_the_base_changes_the_base_and_no_other_set(sketched_llama, tmp_path):
    model = load_sketched(sketched_llama, dtype=torch.float32)
    save_tables(model, tmp_path / "plain")
    load_tables(model, tmp_path / "plain", name="other")
    before = logits(model)
    model.set_tables("base")
    train(model)
    trained = logits(model)
    model.set_tables("other")
    assert torch.equal(logits(model), before)
    model.set_tables("base")
    assert torch.equal(logits(model), trained)


def test_a_model_with_several_sets_is_freed_when_it_is_no_longer_used(sketched_llama, tmp_path):
    model = load_sketched(sketched_llama)
    save_tables(model, tmp_path / "plain")
    load_tables(model, tmp_path / "plain")
    alive = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()
