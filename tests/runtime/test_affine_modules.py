"""Affine sets of experts, tied embeddings and hashed index maps."""

import pytest
import torch
from safetensors.torch import load_file

from helpers.architectures import save_tiny
from helpers.tiny_models import save_tiny_llama
from helpers.tuning import logits, train
from spallm_convert import SketchConfig, convert, load_sketched, save_tables, set_trainable
from spallm_formats import TABLES_FILE


def make_experts(folder):
    source = save_tiny("MixtralForCausalLM", folder / "source")
    return convert_with(folder, source, groups_per_row=2)


def make_tied(folder):
    save_tiny_llama(folder / "source", tie_word_embeddings=True)
    return convert_with(folder, folder / "source", embeddings=True, lm_head=True)


def make_hashed(folder):
    save_tiny_llama(folder / "source")
    return convert_with(folder, folder / "source", mapping="hash", groups_per_row=2)


def convert_with(folder, source, **options):
    convert(source, folder / "out", SketchConfig(effort="fast", **options))
    return folder / "out"


MAKERS = {"experts": make_experts, "tied": make_tied, "hashed": make_hashed}


@pytest.fixture(scope="module", params=MAKERS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return MAKERS[kind](tmp_path_factory.mktemp(kind))


def test_numbers_are_trained_saved_and_loaded(folder, kind, tmp_path):
    trained = load_sketched(folder, dtype=torch.float32)
    before = logits(trained)
    summary = set_trainable(trained, affine=True)
    assert summary.trained_affine * 16 == summary.tables * 2
    train(trained)
    after = logits(trained)
    assert not torch.equal(after, before)
    saved = save_tables(trained, tmp_path / "set")
    tables = {name for name in load_file(folder / "model.safetensors") if name.endswith("_table")}
    stored = load_file(saved / TABLES_FILE)
    stems = {name.removesuffix("_table") for name in tables}
    assert stored.keys() == {stem + end for stem in stems for end in ("_shift", "_scale")}
    changed = [name for name, value in stored.items() if value.unique().numel() > 1]
    assert len(changed) == len(stored)
    live = load_sketched(folder, dtype=torch.float32, tables=saved)
    assert torch.equal(logits(live), after)
    live.set_tables("base")
    assert torch.equal(logits(live), before)
    live.set_tables("tuned")
    live.save_pretrained(tmp_path / "whole")
    assert load_file(tmp_path / "whole/model.safetensors").keys() >= tables
    whole = load_sketched(tmp_path / "whole", dtype=torch.float32)
    torch.testing.assert_close(logits(whole), after, rtol=1e-5, atol=1e-5)
    dense = live.dequantize()
    assert not any(name.endswith(("_shift", "_scale")) for name, _ in dense.named_parameters())
    torch.testing.assert_close(logits(dense), after, rtol=1e-3, atol=1e-3)
