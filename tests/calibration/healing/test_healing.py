"""The parts of healing: reconstruction of blocks, distillation, and the training of tables.

The gain for a whole model is tested in calibration/test_calibrate.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from helpers.blocks import open_blocks
from helpers.tiny_models import save_tiny_llama
from spallm_convert import CalibrationError, devices
from spallm_convert.calibration.blocks.stages import Streams
from spallm_convert.calibration.healing import tuning
from spallm_convert.calibration.healing.distillation import Divergence, distill
from spallm_convert.calibration.healing.heal import MOST_TOKENS, samples_for
from spallm_convert.calibration.healing.reconstruction import reconstruct
from spallm_convert.calibration.healing.tuning import (
    TableTuner,
    rate_factor,
    shuffled_forever,
    split_batches,
)
from spallm_convert.runtime.linear import SketchedLinear
from spallm_convert.source.linear_weights import LinearWeight
from spallm_formats import SketchedModule, pack
from spallm_kernels import assign, kmeans


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Gradients of bfloat16 logits are rounded twice to the eight bits of that dtype.
    [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)],
)
def test_divergence_and_its_gradient_are_those_of_torch(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    # More tokens than are in float32 at a time, and not a multiple of that number.
    found, expected = (torch.randn(300, 50, generator=generator).to(dtype) for _ in range(2))
    found.requires_grad_()
    total = Divergence.apply(found, expected)
    (total / 7).backward()
    wide = found.detach().double().requires_grad_()
    target = log_softmax(expected.double(), -1)
    exact = kl_div(log_softmax(wide, -1), target, reduction="sum", log_target=True)
    (exact / 7).backward()
    assert total.item() == pytest.approx(exact.item(), rel=1e-5)
    assert found.grad.dtype == dtype
    largest = wide.grad.abs().max().item()
    torch.testing.assert_close(found.grad.double(), wide.grad, rtol=0, atol=tolerance * largest)


@pytest.fixture
def tokens():
    return torch.randint(0, 128, (64, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def blocks(tmp_path, tokens):
    folder = save_tiny_llama(tmp_path / "model", initializer_range=0.2).folder
    return open_blocks(folder, tokens, batch=4)


def sketched(linear, bits=2):
    """Sketch a layer of a block without calibration."""
    rows, columns = linear.weight.shape
    weights = linear.weight.detach().float().numpy()
    table, _ = kmeans(weights, np.ones((1, columns), np.float32), 1, 1 << bits)
    table = table.astype(np.float32)
    shape = SketchedModule(in_features=columns, out_features=rows, bits=bits, groups_per_row=1)
    layer = SketchedLinear(shape, bias=linear.bias, table_dtype=torch.float32)
    layer.weight.data = torch.from_numpy(pack(assign(weights, table), bits))
    layer.weight_table.data = torch.from_numpy(table)
    return layer


def all_sketched(blocks, number):
    prefix = blocks.path_of(number) + "."
    return {
        prefix + name: sketched(layer)
        for name, layer in blocks.load(number).named_modules()
        if isinstance(layer, torch.nn.Linear)
    }


def relative_error(blocks, number, tables, layers, streams):
    """Compute the squared relative error of a block's outputs with these tables, by hand."""
    dense = blocks.load(number)
    expected = torch.cat([blocks.run(number, dense, hidden) for hidden in streams.dense])
    for path, layer in layers.items():
        layer.weight_table.data.copy_(tables[path])
        linear = dense.get_submodule(path.removeprefix(blocks.path_of(number) + "."))
        linear.weight.data = layer.dense_weight().detach()
    found = torch.cat([blocks.run(number, dense, hidden) for hidden in streams.sketched])
    blocks.unload(number)
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).square().mean().item()


def reconstructed(blocks, number, layers, streams, dtype=torch.bfloat16):
    replace = lambda path, linear: layers.get(path)  # noqa: E731
    return reconstruct(blocks, number, replace, streams, dtype=dtype, seed=0)


@pytest.mark.parametrize("fast", [True, False])
def test_reconstruction_brings_outputs_of_a_block_nearer(blocks, fast, monkeypatch):
    monkeypatch.setattr(devices, "has_fast_bfloat16", lambda device: fast)
    monkeypatch.setattr(tuning, "LEARNING_RATE", 4e-2)
    streams = Streams(blocks.inputs, list(blocks.inputs))
    for number in range(len(blocks)):  # the second block gets the outputs of the first
        layers = all_sketched(blocks, number)
        tables = {path: layer.weight_table.detach().clone() for path, layer in layers.items()}
        entered = Streams(list(streams.dense), list(streams.sketched))
        first = relative_error(blocks, number, tables, layers, entered)
        found, before, after = reconstructed(blocks, number, layers, streams)
        assert before == pytest.approx(first, rel=0.2)  # measured on an eighth of the text
        assert after < 0.95 * before
        assert found.keys() == layers.keys()
        assert all(torch.equal(table, table.bfloat16().float()) for table in found.values())
        last = relative_error(blocks, number, found, layers, entered)
        assert last < 0.95 * first
        left = Streams(*(torch.cat(stream) for stream in streams))
        error = ((left.sketched - left.dense).norm(dim=-1) / left.dense.norm(dim=-1)).square()
        assert error.mean().item() == pytest.approx(last, rel=0.05 if fast else 1e-4)


def test_reconstruction_of_what_is_exact_changes_nothing(blocks):
    streams = Streams(blocks.inputs, list(blocks.inputs))
    assert reconstructed(blocks, 0, {}, streams) == ({}, 0, 0)
    assert all(map(torch.equal, streams.dense, streams.sketched))


def test_a_block_without_sketched_layers_lets_errors_through(blocks):
    streams = Streams(blocks.inputs, [2 * hidden for hidden in blocks.inputs])
    tables, before, after = reconstructed(blocks, 0, {}, streams)
    assert tables == {}
    assert before == after > 0


def test_layers_that_nothing_reaches_keep_their_tables(blocks):
    """Use a layer that its block never calls, like an expert that no token chose."""
    layers = {"model.layers.0.unused": sketched(blocks.load(0).self_attn.k_proj)}
    blocks.load(0).unused = torch.nn.Linear(64, 32)
    blocks._linears["model.layers.0.unused.weight"] = LinearWeight(32, 64)
    kept = layers["model.layers.0.unused"].weight_table.detach().clone()
    streams = Streams(blocks.inputs, [2 * hidden for hidden in blocks.inputs])
    tables, before, after = reconstructed(blocks, 0, layers, streams)
    assert torch.equal(tables["model.layers.0.unused"], kept)
    assert before == after > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers_are_named(blocks, bad):
    streams = Streams(blocks.inputs, [hidden * bad for hidden in blocks.inputs])
    with pytest.raises(CalibrationError, match=r"model.layers.0: its outputs on the healing text"):
        reconstructed(blocks, 0, {}, streams)


def test_the_best_tables_count(blocks):
    module = torch.nn.ModuleDict({"layer": sketched(blocks.load(0).self_attn.k_proj)})
    table = module["layer"].weight_table
    tuner = TableTuner(module, 2, 1.0, torch.bfloat16)
    states = [table.detach().clone()]
    for loss in (0.5, 0.75):
        tuner.step(table.square().sum())
        states.append(table.detach().clone())
        with tuner.as_stored():
            tuner.offer(loss)
        assert torch.equal(table, states[-1])  # training goes on from what was not rounded
    assert not torch.equal(states[1], states[1].bfloat16().float())
    best = states[1].bfloat16().float()
    assert torch.equal(tuner.put_best()["layer"], best)
    assert torch.equal(table, best)
    assert tuner.least == 0.5


def test_a_step_whose_gradient_is_not_finite_is_left_out(blocks):
    layer = sketched(blocks.load(0).self_attn.k_proj)
    table, before = layer.weight_table, layer.weight_table.detach().clone()
    tuner = TableTuner(layer, 5, 1.0, torch.float32)
    tuner.step(table.square().sum() * float("nan"))
    assert torch.equal(table, before)
    tuner.step(table.square().sum())
    assert table.isfinite().all()
    assert not torch.equal(table, before)


@pytest.mark.parametrize(("rate", "gains"), [(4e-2, True), (1e3, False)])
def test_distillation_brings_predictions_nearer_or_leaves_tables(
    blocks, tokens, rate, gains, monkeypatch
):
    monkeypatch.setattr(tuning, "LEARNING_RATE", rate)
    final, said = blocks.inputs, []
    for number in range(len(blocks)):
        block = blocks.load(number)
        with torch.no_grad():
            final = [blocks.run(number, block, hidden) for hidden in final]

    model = blocks.assemble(lambda _, layer: sketched(layer))
    tables = {name: table.clone() for name, table in model.named_parameters() if "table" in name}
    found = distill(
        blocks, model, {}, tokens, final, steps=40, dtype=torch.float32, seed=0, say=said.append
    )
    assert len(said) == 10
    if gains:
        assert found.after < 0.97 * found.before
    else:
        assert found.after == found.before
    changed = {
        name
        for name, table in found.tables.items()
        if not torch.equal(table, tables[f"{name}.weight_table"])
    }
    assert changed == (found.tables.keys() if gains else set())


def test_rates_are_in_proportion_to_the_tables(blocks):
    """Multiply tables by a thousand and divide inputs by it: the steps stay the same."""
    moved = []
    for scale in (1, 1000):
        layer = sketched(blocks.load(0).self_attn.k_proj)
        layer.weight_table.data *= scale
        before = layer.weight_table.detach().clone()
        TableTuner(layer, 5, 1.0, torch.float32).step((layer.weight_table / scale).square().sum())
        moved.append((layer.weight_table.detach() - before) / scale)
    assert moved[0].abs().max() > 0
    torch.testing.assert_close(moved[0], moved[1], rtol=0.02, atol=0)


def test_rates_are_in_proportion_to_the_distance_between_entries(blocks):
    largest = []
    for bits in (2, 4):
        layer = sketched(blocks.load(0).self_attn.k_proj, bits)
        layer.weight_table.data.fill_(1.0)
        TableTuner(layer, 5, 1.0, torch.float32).step(layer.weight_table.square().sum())
        largest.append((layer.weight_table.detach() - 1).abs().max().item())
    assert largest[0] == pytest.approx(4 * largest[1], rel=1e-3)


def test_one_batch_in_eight_is_held_out():
    assert split_batches(20) == ([n for n in range(20) if n % 8], [0, 8, 16])
    assert split_batches(2) == ([1], [0])


def test_pieces_come_shuffled_forever_each_once_before_any_again():
    pieces = [3, 5, 7, 9]
    drawn = shuffled_forever(pieces, seed=1)
    rounds = [[next(drawn) for _ in pieces] for _ in range(20)]
    assert all(sorted(found) == pieces for found in rounds)
    assert len(set(map(tuple, rounds))) > 5
    again = shuffled_forever(pieces, seed=1)
    assert [[next(again) for _ in pieces] for _ in range(20)] == rounds


def test_as_much_text_as_the_steps_use():
    # 70 steps train on 140 samples of 512 tokens, and an eighth of all samples is held out.
    assert samples_for(70, 512) == 160
    assert samples_for(10**6, 512) == MOST_TOKENS // 512
    assert samples_for(1, 10**6) == 2


def test_tokens_that_both_models_rule_out_cost_nothing():
    found, expected = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    found[:, 5:] = expected[:, 5:] = -torch.inf
    expected_loss = Divergence.apply(found[:, :5], expected[:, :5])
    assert Divergence.apply(found, expected) == pytest.approx(expected_loss)


def test_the_rate_rises_and_falls():
    rates = [rate_factor(step, 100) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[9] == rates[10] == 1
    assert rates[11:] == sorted(rates[11:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert [rate_factor(step, 1) for step in range(1)] == [1]


@pytest.mark.parametrize("fast", [True, False])
def test_products_are_in_bfloat16_where_that_is_fast(fast, monkeypatch):
    monkeypatch.setattr(devices, "has_fast_bfloat16", lambda device: fast)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    with devices.fast_products(torch.device("cpu")):
        product, total = x @ x, x + x
    assert product.dtype == (torch.bfloat16 if fast else torch.float32)
    assert total.dtype == torch.float32


def test_peak_memory_is_in_bytes():
    # torch alone takes a hundred megabytes; no test machine has a terabyte.
    assert 10**8 < devices.peak_memory(torch.device("cpu")) < 10**12
