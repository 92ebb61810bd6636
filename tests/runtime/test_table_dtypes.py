"""Dtypes of sets: no value is rounded, and optimizers find the dtype that they know."""

import copy

import pytest
import torch

from helpers.tuning import logits, train
from spallm_convert import load_sketched, load_tables, save_tables, set_trainable

NARROW, WIDE = torch.bfloat16, torch.float32


@pytest.fixture
def saved(sketched_llama, tmp_path):
    """Folders of trained tables, by dtype, and the values in them."""
    found = {}
    for dtype in (NARROW, torch.float16, WIDE):
        tuned = load_sketched(sketched_llama, dtype=dtype)
        if dtype != torch.float16:  # whose gradients overflow
            train(tuned, seed=1)
        found[dtype] = save_tables(tuned, tmp_path / str(dtype)), tables(tuned)
    return found


def tables(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "weight_table" in n}


def dtypes(model):
    return {value.dtype for value in tables(model).values()}


def same(found, expected):
    """The same values, whatever dtype holds them."""
    return all(torch.equal(found[name].double(), expected[name].double()) for name in expected)


@pytest.mark.parametrize("own", [NARROW, WIDE])
@pytest.mark.parametrize("stored", [NARROW, WIDE])
def test_one_optimizer_trains_the_base_and_any_set(sketched_llama, saved, own, stored):
    model = load_sketched(sketched_llama, dtype=own)
    before = tables(model)
    folder, values = saved[stored]
    load_tables(model, folder, name="mine", activate=False)
    wide = torch.promote_types(own, stored)
    assert dtypes(model) == {wide}
    assert same(tables(model), before)
    optimizer = train(model, steps=1)
    base = tables(model)
    model.set_tables("mine")
    assert same(tables(model), values)
    train(model, steps=1, optimizer=optimizer)
    mine = tables(model)
    assert not same(mine, values)
    for name, expected in {"base": base, "mine": mine}.items():
        model.set_tables(name)
        assert dtypes(model) == {wide}
        assert same(tables(model), expected)
        train(copy.deepcopy(model), steps=1)


def test_an_optimizer_from_before_trains_a_narrower_set(sketched_llama, saved):
    model = load_sketched(sketched_llama, dtype=WIDE)
    optimizer = train(model, steps=1)
    base = tables(model)
    load_tables(model, saved[NARROW][0])
    assert same(tables(model), saved[NARROW][1])
    train(model, steps=1, optimizer=optimizer)
    assert dtypes(model) == {WIDE}
    model.set_tables("base")
    assert same(tables(model), base)


def test_halves_of_both_kinds_are_held_in_float32(sketched_llama, saved):
    model = load_sketched(sketched_llama, dtype=NARROW)
    before = tables(model)
    load_tables(model, saved[torch.float16][0])
    assert dtypes(model) == {WIDE}
    assert same(tables(model), saved[torch.float16][1])
    model.set_tables("base")
    assert same(tables(model), before)


def test_a_wider_set_widens_the_sets_before_it(sketched_llama, saved):
    model = load_sketched(sketched_llama, dtype=NARROW)
    before = logits(model)
    load_tables(model, saved[NARROW][0], name="narrow")
    narrow = logits(model)
    assert dtypes(model) == {NARROW}
    load_tables(model, saved[WIDE][0], name="wide", activate=False)
    for name, expected in {"base": before, "narrow": narrow}.items():
        model.set_tables(name)
        assert dtypes(model) == {WIDE}
        assert torch.equal(logits(model), expected)
    assert logits(model).dtype == NARROW  # activations follow the other parameters


def test_set_trainable_casts_sets_that_are_not_active(sketched_llama, saved):
    model = load_sketched(sketched_llama, dtype=NARROW)
    before = tables(model)
    load_tables(model, saved[NARROW][0], name="mine")
    set_trainable(model)
    optimizer = train(model, steps=1)
    mine = tables(model)
    model.set_tables("base")
    assert dtypes(model) == {WIDE}
    assert same(tables(model), before)
    train(model, steps=1, optimizer=optimizer)
    model.set_tables("mine")
    assert dtypes(model) == {WIDE}
    assert same(tables(model), mine)


def test_tables_are_saved_in_the_dtype_that_holds_all_sets(sketched_llama, saved, tmp_path):
    model = load_sketched(sketched_llama, dtype=NARROW)
    before = tables(model)
    load_tables(model, saved[WIDE][0], activate=False)
    save_tables(model, tmp_path / "again")
    other = load_sketched(sketched_llama, dtype=NARROW, tables=tmp_path / "again")
    assert dtypes(other) == {WIDE}
    assert same(tables(other), before)


def test_a_cast_by_hand_is_not_undone_by_a_change_of_sets(sketched_llama, saved):
    model = load_sketched(sketched_llama, dtype=NARROW)
    load_tables(model, saved[NARROW][0])
    for name, parameter in model.named_parameters():
        if "weight_table" in name:
            parameter.data = parameter.data.to(WIDE)
    model.set_tables("base")
    assert dtypes(model) == {WIDE}
