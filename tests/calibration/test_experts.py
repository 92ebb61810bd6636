"""Experts: layers that get some tokens, different tokens in each stream, or no tokens."""

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from helpers.blocks import open_blocks
from helpers.calibration import calibrated, save_text
from helpers.tiny_models import save_tiny_llama
from helpers.training import word_tokenizer
from spallm_convert import SketchConfig, convert
from spallm_convert.calibration.blocks.stages import Streams
from spallm_convert.calibration.sketching import replay_block, sketch_block
from spallm_convert.calibration.store import CalibratedModule
from spallm_convert.sketch.plan import make_plan
from spallm_convert.source.locate import find_here


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("text") / "text.txt", words=20000)


def options(text, **changes):
    return calibrated(text, samples=8, seqlen=32, **changes)


class Experts(nn.Module):
    """Five linear experts in place of Llama's MLP, of which the router never chooses two."""

    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.router = nn.Linear(size, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(5))

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen = self.router(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                out.index_add_(0, rows, expert(flat[rows]))
        return out.view_as(hidden)


def test_experts_see_their_own_tokens(text, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_llama, "LlamaMLP", Experts)
    folder = save_tiny_llama(tmp_path / "model").folder
    word_tokenizer().save_pretrained(folder)
    report = convert(folder, tmp_path / "out", options(text, bits=2, groups_per_row=2))
    errors = {m["name"]: m["relative_output_error"] for m in report.modules}
    experts = [f"model.layers.0.mlp.experts.{number}" for number in range(5)]
    assert all(0 < errors[name] < 0.5 for name in experts[:3])
    assert errors[experts[3]] == errors[experts[4]] == 0  # no token reaches them


class HalfExpert(nn.Module):
    """One expert in place of Llama's MLP, for the half of the tokens that score highest, sorted."""

    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.hidden_size, 1, bias=False)
        self.expert = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen = self.router(flat)[:, 0].argsort(descending=True)[: len(flat) // 2]
        return (
            torch.zeros_like(flat).index_add(0, chosen, self.expert(flat[chosen])).view_as(hidden)
        )


def test_experts_with_as_many_but_other_tokens_make_up_for_nothing(text, tmp_path, monkeypatch):
    """Give an expert equally many tokens in both models, but different ones row by row."""
    monkeypatch.setattr(modeling_llama, "LlamaMLP", HalfExpert)
    folder = save_tiny_llama(tmp_path / "model").folder
    word_tokenizer().save_pretrained(folder)
    report = convert(folder, tmp_path / "out", options(text, bits=2, groups_per_row=2))
    errors = {m["name"]: m["relative_output_error"] for m in report.modules}
    assert errors["model.layers.1.mlp.expert"] < 0.5


@pytest.mark.parametrize("which", ["all", "no"])
def test_both_streams_leave_a_block_as_it_is_then(tmp_path, monkeypatch, which):
    """Sketch layers that get all tokens, some or none; or sketch no layer at all."""
    monkeypatch.setattr(modeling_llama, "LlamaMLP", Experts)
    folder = save_tiny_llama(tmp_path / "model").folder
    plan = make_plan(
        find_here(str(folder)).open(folder), SketchConfig(effort="fast", bits=2, groups_per_row=1)
    )
    tokens = torch.randint(2, 128, (6, 24), generator=torch.Generator().manual_seed(0))
    blocks = open_blocks(folder, tokens)
    layers = plan.layers if which == "all" else {}
    targets = blocks.targets(0, layers.values())
    found, expected = (Streams(list(blocks.inputs), list(blocks.inputs)) for _ in range(2))
    made = list(sketch_block(blocks, 0, targets, found, plan.metadata))
    assert {layer.layer.path for layer in made} == {target.path for target in targets.values()}
    kept = {m.layer.name: CalibratedModule(m.index_map, m.table, m.sums) for m in made}

    def read(layer):
        return kept[layer.name].dense(layer.module, plan.metadata)

    replay_block(blocks, 0, targets, read, expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert all(map(torch.equal, *found)) == (which == "no")


class TwoOfThree(nn.Module):
    """Two linear experts in place of Llama's MLP that share all tokens, and a third for none."""

    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.experts = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(3))

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        out = torch.zeros_like(flat)
        for number in range(2):
            rows = ((flat[:, 0] > 0) == bool(number)).nonzero()[:, 0]
            out = out.index_add(0, rows, self.experts[number](flat[rows]))
        return out.view_as(hidden)


def test_experts_share_and_need_not_be_reached(text, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_llama, "LlamaMLP", TwoOfThree)
    folder = save_tiny_llama(tmp_path / "model").folder
    word_tokenizer().save_pretrained(folder)
    report = convert(folder, tmp_path / "out", options(text, target_bits=5))
    modules = {m["name"]: m for m in report.modules}
    for block in range(2):
        experts = [modules[f"model.layers.{block}.mlp.experts.{number}"] for number in range(3)]
        assert len({(m["bits"], m["groups_per_row"]) for m in experts}) == 1
        assert experts[0]["relative_output_error"] > 0
        assert experts[2]["relative_output_error"] == 0
