"""Bits by layer: the allocation with the least loss in a budget, and conversions that use it."""

import ctypes
import itertools
import json
import os
import random
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.calibration import (
    StopAt,
    calibrated,
    contents,
    divergence,
    save_text,
    save_uneven_source,
)
from spallm_convert import (
    OptionError,
    SketchConfig,
    convert,
    load_sketched,
)
from spallm_convert.calibration.allocation import allocate
from spallm_convert.calibration.allocation.allocate import fit_into, solve
from spallm_convert.calibration.store import CalibratedModules, write_sound
from spallm_convert.cli import main
from spallm_convert.conversion.convert import plan_conversion
from spallm_convert.sketch.layer import Layer
from spallm_convert.sketch.widths import Choice, budget_for, choices, stored_bits
from spallm_formats import SketchedCheckpoint, SketchedModule


def cases(count):
    """Yield sizes and losses of a few sets with a few options each, and a budget that fits."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        sets = rng.integers(1, 6)
        sizes = [(64 * rng.integers(1, 90, rng.integers(1, 5))).tolist() for _ in range(sets)]
        losses = [rng.lognormal(-8, 3, len(of_set)).tolist() for of_set in sizes]
        least, most = (sum(map(end, sizes)) for end in (min, max))
        yield sizes, losses, int(rng.integers(least, most + 2))


def total(numbers, chosen):
    return sum(of_set[number] for of_set, number in zip(numbers, chosen, strict=True))


def test_no_allocation_is_better():
    for sizes, losses, budget in cases(100):
        chosen = solve(sizes, losses, budget)
        every = itertools.product(*(range(len(of_set)) for of_set in sizes))
        fitting = [one for one in every if total(sizes, one) <= budget]
        assert tuple(chosen) in fitting
        least = min(total(losses, one) for one in fitting)
        assert total(losses, chosen) == pytest.approx(least, rel=1e-12)
    with pytest.raises(ValueError, match="the smallest options need 5 bits, the budget is 4"):
        solve([[2, 4], [3, 9]], [[1, 0], [1, 0]], 4)
    assert total([[2, 4], [3, 9]], solve([[2, 4], [3, 9]], [[0, 0], [0, 0]], 5)) == 5


def test_it_is_solved_without_anywhere_to_print_to(monkeypatch):
    case = [[2, 4], [3, 9]], [[1, 0], [1, 0]], 7
    solve(*case)  # imports what it needs
    monkeypatch.setattr(sys, "stdout", None)
    assert solve(*case) == [1, 0]
    kept = os.dup(1)
    os.close(1)
    try:
        assert solve(*case) == [1, 0]
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def test_what_the_solver_leaves_over_the_budget_is_taken_back():
    for sizes, losses, budget in cases(100):
        largest = [of_set.index(max(of_set)) for of_set in sizes]
        chosen = fit_into(budget, largest, sizes, losses)
        assert total(sizes, chosen) <= budget
        assert fit_into(budget, chosen, sizes, losses) == chosen
        least = sum(map(min, sizes))
        assert total(sizes, fit_into(least, largest, sizes, losses)) == least
    # 4 bits over the budget: the set with the least added loss gives way, however much it saves.
    sizes, losses = [[2, 6], [2, 10], [2, 6]], [[5, 1], [4, 1], [6, 1]]
    assert fit_into(18, [1, 1, 1], sizes, losses) == [1, 0, 1]


def test_the_least_size_is_a_target_that_can_be_met():
    """Check the least size per weight, and the range that the error message names."""
    rng = np.random.default_rng(1)
    for sizes, losses, _ in cases(100):
        weights = int(rng.integers(1, 10**6))
        least, most = (sum(map(end, sizes)) for end in (min, max))
        assert budget_for(sizes, weights, least / weights) == least
        assert budget_for(sizes, weights, most / weights) == most
        assert total(sizes, solve(sizes, losses, least)) == least
        if most - least > weights / 100:
            with pytest.raises(OptionError) as refused:
                budget_for(sizes, weights, 0.999 * least / weights)
            low, high = map(float, re.findall(r"[\d.]+", str(refused.value))[-2:])
            assert least <= budget_for(sizes, weights, low) < least + weights / 500
            assert most >= budget_for(sizes, weights, high) > most - weights / 500
    for seed in range(8):
        sizes, losses = llama_like(120, seed)
        least = sum(map(min, sizes))
        assert total(sizes, solve(sizes, losses, least)) == least


def llama_like(sets, seed):
    """Return sizes and losses like those of a Llama model."""
    rng = np.random.default_rng(seed)
    shapes = [(960, 576), (576, 576), (3072, 576), (576, 1536)]
    sizes, losses = [], []
    for number in range(sets):
        rows, columns = shapes[number % 4]
        scale = rng.lognormal(-7)
        options = list(itertools.product((2, 3, 4), (1, 2, 4)))
        sizes.append([rows * (columns * bits + groups * 2**bits * 16) for bits, groups in options])
        losses.append([scale * 4.0**-b * (1 - 0.02 * g * rng.random()) for b, g in options])
    return sizes, losses


def test_large_cases_leave_no_room_for_an_upgrade_and_print_nothing(capfd):
    for seed in range(8):
        sizes, losses = llama_like(120, seed)
        least, most = (sum(map(end, sizes)) for end in (min, max))
        budget = (3 * least + (seed + 1) * most) // (seed + 4)
        chosen = solve(sizes, losses, budget)
        left = budget - total(sizes, chosen)
        assert left >= 0
        for number, (size, loss) in zip(chosen, zip(sizes, losses, strict=True), strict=True):
            better = [s for s, value in zip(size, loss, strict=True) if value < loss[number]]
            assert all(s - size[number] > left for s in better)
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == ""


def test_choices_are_sane_and_hold_the_uniform_ones():
    config = calibrated("text", target_bits=3)

    def of(columns, options=config):
        module = SketchedModule(in_features=columns, out_features=8, bits=4, groups_per_row=1)
        return choices(module, options), module

    assert of(64)[0] == [(2, 1), (3, 1), (4, 1)]
    assert of(576)[0] == [(2, 1), (2, 2), (3, 1), (3, 2), (4, 1), (4, 2)]
    assert of(4096)[0] == list(itertools.product((2, 3, 4), (1, 2, 4)))
    assert (4, 3) in of(3072)[0]
    assert (4, 2) in of(2 * 1025)[0]  # as every conversion has it, slow or not
    found, module = of(4096)
    sizes = [stored_bits(module, choice, config) / module.weights for choice in found]
    assert sizes == pytest.approx([b + g * 2**b * 16 / 4096 for b, g in found])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_uneven_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("text") / "text.txt", words=5000)


def options(text, **changes):
    return calibrated(text, **{"target_bits": 4.25, "samples": 8, "seqlen": 32} | changes)


@pytest.fixture(scope="module")
def converted(source, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "out"
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    report = convert(source, folder, options(text))
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    return folder, report


def test_bits_are_given_within_the_target_and_fused_layers_share(converted):
    folder, report = converted
    assert 4.0 < report.totals["bits_per_weight"] <= 4.25
    modules = {m["name"]: (m["bits"], m["groups_per_row"]) for m in report.modules}
    assert len(set(modules.values())) > 1
    for block in ("model.layers.0", "model.layers.1"):
        assert len({modules[f"{block}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert modules[f"{block}.mlp.gate_proj"] == modules[f"{block}.mlp.up_proj"]
    first, second = (
        sum(m["bits"] for m in report.modules if f"layers.{number}." in m["name"])
        for number in range(2)
    )
    assert first < second
    losses = report.document["predicted_loss"]
    assert losses["4"] < losses["chosen"] < losses["2"]
    assert losses["4"] < losses["3"] < losses["2"]
    model = load_sketched(folder)
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    bits, groups = modules["model.layers.1.mlp.down_proj"]
    assert layer.weight_table.shape == (128, groups, 2**bits)


def test_less_is_lost_than_at_the_uniform_size_next_below(converted, source, text, tmp_path):
    """Use 4.25 bits per weight, a little more than the about 4.2 that three bits take here."""
    folder, report = converted
    plain = convert(source, tmp_path / "out", options(text, target_bits=None, bits=3))
    assert plain.totals["bits_per_weight"] == pytest.approx(4, abs=0.3)
    assert report.document["predicted_loss"]["chosen"] < report.document["predicted_loss"]["3"]
    assert divergence(source, folder, text) < 0.9 * divergence(source, tmp_path / "out", text)


def test_what_is_said_about_mixed_bits(converted, capsys):
    folder, report = converted
    card = (folder / "README.md").read_text()
    assert "# model, sketched to 4.25 bits\n" in card
    assert "- 4.25-bit\n" in card
    widths = ", ".join(map(str, report.widths))
    predicted = report.document["predicted_loss"]
    assert (
        f"| bits per code | {widths}, by layer; predicted to lose {predicted['chosen']:.4f}" in card
    )
    for command in ("verify", "inspect"):
        with pytest.raises(SystemExit) as stopped:
            main([command, str(folder)])
        assert not stopped.value.code
    shown = capsys.readouterr().out
    assert f"14 sketched layers, {widths} bits" in shown
    assert "layer shape bits groups bits per weight" in " ".join(shown.split())
    assert f"{predicted['chosen']:.4f} nats per token ({predicted['2']:.4f} at 2 bits, " in shown


def test_it_is_resumed_with_the_same_bits(converted, source, text, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, options(text), progress=StopAt(lines=3))
    assert not out.exists()  # nothing was done that could be kept
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, options(text), progress=StopAt(modules=1))
    assert [path.name for path in out.rglob("allocation-*.json")]
    progress = StopAt()
    convert(source, out, options(text), resume=True, progress=progress)
    assert progress.said == []
    assert contents(out) == contents(converted[0])


def test_targets_that_cannot_be_met(source, text, tmp_path):
    for target in (1.5, 9):
        with pytest.raises(
            OptionError, match=rf"target_bits {target} cannot be met.* 2\.445 to 5\.777 bits"
        ):
            convert(source, tmp_path / "out", options(text, target_bits=target))
    assert not (tmp_path / "out").exists()
    with pytest.raises(OptionError, match="not known in advance"):
        plan_conversion(source, options(text))
    for bad in (0, -1.0, float("nan"), "3", True):
        with pytest.raises(OptionError, match="target_bits must be a number above 0, found"):
            options(text, target_bits=bad)
    for change, message in (
        ({"bits": 3}, "target_bits chooses bits itself, found 3"),
        ({"groups_per_row": 2}, "target_bits chooses groups_per_row itself, found 2"),
        ({"mapping": "hash"}, "target_bits is for the mapping 'cluster', found 'hash'"),
        ({"fallback": True}, "target_bits: not with fallback"),
    ):
        with pytest.raises(OptionError, match=message):
            options(text, **change)


def test_the_command_line(source, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(source), "--calibration", str(text), "--target-bits", "4.5"]
    arguments += ["--samples", "4", "--seqlen", "16"]

    def run(*more):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *more])
        return stopped.value.code, capsys.readouterr()

    code, captured = run("--json")
    assert code == 0, captured.err
    document = json.loads(captured.out)
    assert document["output"] == "model-spallm-4.5bit"
    assert document["options"]["target_bits"] == 4.5
    assert document["versions"]["scipy"]
    code, captured = run("--bits", "4")
    assert code == 2
    assert "--bits and --target-bits cannot be combined" in captured.err
    code, captured = run("--dry-run")
    assert code == 2
    assert "not known in advance" in captured.err


def test_an_allocation_is_kept_as_it_is_or_not_at_all(tmp_path):
    shape = SketchedModule(in_features=64, out_features=4, bits=4, groups_per_row=1)
    plan = SimpleNamespace(metadata=SimpleNamespace(modules={"a": shape}))
    config = SketchConfig(effort="fast")
    losses = {"chosen": 1 / 3, "2": 0.1, "3": 0.05, "4": 0.02}
    made = allocate.Allocation({"a": Choice(2, 1)}, losses)
    assert allocate.Allocation.read(tmp_path, plan, config) is None
    made.write(tmp_path)
    assert allocate.Allocation.read(tmp_path, plan, config) == made
    (file,) = tmp_path.iterdir()
    sound = file.read_text()
    file.write_text(sound.replace("0.1", "0.2"))  # it no longer has the hash in its name
    assert allocate.Allocation.read(tmp_path, plan, config) is None
    file.unlink()
    for old, new in [
        ('"a"', '"b"'),
        ("2,", "7,"),
        ('"chosen"', '"other"'),
        ("0.1", "NaN"),
        ("0.1", "1e999"),
        ("0.1", "true"),
        ("0.1", '"0.1"'),
        (sound, "[]"),
        (sound, "[" * 100_000),
    ]:
        write_sound(tmp_path, "allocation", sound.replace(old, new).encode(), ".json")
        assert allocate.Allocation.read(tmp_path, plan, config) is None, new


def test_a_damaged_allocation_is_made_anew(converted, source, text, tmp_path):
    """Check that blocks count as missing if their bits or groups differ from the allocation."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, options(text), progress=StopAt(modules=8))
    (file,) = out.rglob("allocation-*.json")
    file.write_bytes(file.read_bytes()[:-9])
    (block,) = out.rglob("block-*.safetensors")
    store = CalibratedModules(block.parent)
    metadata = SketchedCheckpoint.open(converted[0]).metadata
    modules = metadata.modules
    first, *others = (
        Layer(name, module, None, ()) for name, module in modules.items() if "layers.0." in name
    )
    assert store.has([first, *others], metadata)
    for change in ({"bits": first.module.bits ^ 1}, {"groups_per_row": 4}):
        changed = replace(first, module=replace(first.module, **change))
        assert not store.has([changed, *others], metadata)
    assert not store.has([first], replace(metadata, table_dtype="float16"))
    assert not store.has([first], replace(metadata, mapping="hash"))
    convert(source, out, options(text), resume=True)
    assert contents(out) == contents(converted[0])
