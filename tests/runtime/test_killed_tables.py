"""Whenever saving tables is killed, the folder holds the former set or the new one."""

import random
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.kills import count_changes, kill_after, kill_at_change
from helpers.tuning import train
from spallm_convert import load_sketched, load_tables, save_tables
from spallm_formats import TABLES_FILE, TABLES_METADATA_FILE


@pytest.fixture(scope="module")
def model(sketched_llama, tmp_path_factory):
    model = load_sketched(sketched_llama)
    save_tables(model, tmp_path_factory.mktemp("saved") / "once")  # its fingerprint is known now
    return model


@pytest.fixture(scope="module")
def new(model):
    """The tables that the killed processes save."""
    train(model)
    return tables(model)


@pytest.fixture(params=["describes itself", "described apart"])
def old(request, sketched_llama, new, tmp_path):
    """A folder with other tables, and what they are."""
    folder = tmp_path / "tables"
    before = load_sketched(sketched_llama)
    save_tables(before, folder)
    if request.param == "described apart":  # as the first versions wrote it
        tensors = load_file(folder / TABLES_FILE)
        save_file(tensors, folder / TABLES_FILE, metadata={"format": "pt"})
    return folder, tables(before)


def tables(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "weight_table" in n}


def same(found, expected):
    return all(torch.equal(found[name], value) for name, value in expected.items())


def which(folder, base, old, new):
    """Load a folder and say which of the sets it holds."""
    load_tables(base, folder, name="found")
    found = tables(base)
    base.set_tables("base")
    assert same(found, old) != same(found, new)
    return "new" if same(found, new) else "old"


def test_killed_before_each_change_it_holds_one_of_the_sets(model, new, old, sketched_llama):
    folder, before = old
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    base = load_sketched(sketched_llama)
    found = []
    for number in range(1, count_changes(lambda: save(model, folder), folder) + 1):
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        assert kill_at_change(number, lambda: save(model, folder), folder)
        found.append(which(folder, base, before, new))
        save(model, folder)  # whatever is left over is no hindrance
        assert which(folder, base, before, new) == "new"
        assert sorted(p.name for p in folder.iterdir()) == [TABLES_METADATA_FILE, TABLES_FILE]
    assert len(found) > 6
    assert found == sorted(found, reverse=True)  # once the new set is there, it stays
    assert {"old", "new"} == set(found)


def test_killed_before_each_change_a_first_set_is_there_or_not(model, new, tmp_path):
    def first():
        save_tables(model, tmp_path / "tables")

    for number in range(1, count_changes(first, tmp_path) + 1):
        shutil.rmtree(tmp_path / "tables", ignore_errors=True)
        assert kill_at_change(number, first, tmp_path)
        if (tmp_path / "tables" / TABLES_FILE).exists():
            load_tables(model, tmp_path / "tables", name="found", activate=False)


def test_killed_at_random_moments_it_holds_one_of_the_sets(model, new, sketched_llama, tmp_path):
    other, moments = load_sketched(sketched_llama), random.Random(0)
    before, folder = tables(other), tmp_path / "tables"
    save(other, folder)

    def one_after_another():
        while True:
            save(model, folder)
            save(other, folder)

    base = load_sketched(sketched_llama)
    found = set()
    start = time.perf_counter()
    count_changes(lambda: save(other, folder), folder)
    enough = 4 * (time.perf_counter() - start)  # for both sets, on a busy machine too
    for _ in range(30):
        assert kill_after(moments.uniform(0, enough), one_after_another)
        found.add(which(folder, base, before, new))
    assert found == {"old", "new"}


def save(model, folder):
    save_tables(model, folder, overwrite=True)
