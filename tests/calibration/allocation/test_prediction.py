"""Predicted losses: close to the losses of sketching, and measured on held-out text."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.blocks import open_blocks
from helpers.calibration import calibrated, save_text, save_uneven_source
from spallm_convert import CalibrationError, convert
from spallm_convert.calibration.allocation import prediction, sensitivity
from spallm_convert.calibration.allocation.prediction import draw_rows, fused, predict
from spallm_convert.calibration.allocation.sensitivity import Sensitivity
from spallm_convert.sketch.plan import make_plan
from spallm_convert.sketch.widths import Choice
from spallm_convert.source.locate import find_here
from spallm_kernels import fit, look_up, prepare_hessian

TOKENS = torch.randint(2, 128, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_uneven_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("text") / "text.txt", words=5000)


def options(text, **changes):
    return calibrated(text, target_bits=4.25, samples=8, seqlen=32, **changes)


def test_what_engines_fuse():
    def fused_alike(stages):
        return fused(stages, {name: (64, 32) for names in stages for name in names})

    block = [["q", "k", "v"], ["o"], ["mlp.gate", "mlp.up"], ["mlp.down"]]
    assert fused_alike(block) == block
    experts = [["q"], ["experts.0.gate", "experts.0.up"], ["experts.0.down"], ["experts.11.up"]]
    assert sorted(fused_alike(experts)) == [
        ["experts.0.down"],
        ["experts.0.gate", "experts.0.up", "experts.11.up"],
        ["q"],
    ]
    late = [["e.0.up"], ["e.1.gate"], ["e.0.gate", "e.1.up"], ["w1"], ["w2"]]
    expected = [["e.0.up", "e.1.gate", "e.0.gate", "e.1.up"], ["w1"], ["w2"]]
    assert sorted(fused_alike(late)) == expected
    sequential = [["mlp.0"], ["mlp.2"]]
    assert fused(sequential, {"mlp.0": (128, 32), "mlp.2": (32, 128)}) == sequential


def test_drawn_rows_stand_for_all():
    rng = np.random.default_rng(0)
    shares, spreads = rng.lognormal(0, 2, 500), rng.lognormal(size=500)
    shares[:100] = 0
    losses = spreads * rng.uniform(0.9, 1.1, 500)
    rows, factors = draw_rows(shares, spreads, 32)
    assert len(rows) <= 32
    assert factors @ losses[rows] == pytest.approx(shares @ losses, rel=0.03)
    assert factors @ spreads[rows] == pytest.approx(shares @ spreads)
    rows, factors = draw_rows(shares[:20], spreads[:20], 32)
    assert (rows == np.arange(20)).all()
    assert (factors == shares[:20]).all()
    _, factors = draw_rows(np.zeros(50), spreads[:50], 32)
    assert not factors.any()


def random_sensitivity(rows):
    """Return a sensitivity for N outputs and the tokens of the first of four batches."""
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.lognormal(size=64)).float()
    return Sensitivity(rng.lognormal(size=rows), tokens)


def predicted(source, text, *, ignore=(), **changes):
    """Predict the losses of all modules for random sensitivities.

    changes: constants of `prediction` to replace. Losses are measured on the first of four batches,
    and rows are sketched for the other three.
    """
    checkpoint = find_here(str(source)).open(source)
    config = options(text, ignore=ignore)
    plan = make_plan(checkpoint, config)
    by_token = random_sensitivity(1).tokens
    costs = {
        layer.path: random_sensitivity(layer.module.out_features) for layer in plan.layers.values()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "TOKENS", len(by_token))
        for name, value in changes.items():
            patch.setattr(prediction, name, value)
        blocks = open_blocks(source, TOKENS)
        sets = predict(blocks, plan, config, costs, say=lambda line: None)
    assert len(blocks.inputs) == 4  # to be sketched on
    return {name: values for of_set in sets for name, values in of_set.losses.items()}


def test_predictions_are_near_what_sketching_loses(source, text):
    """Compare a sample of rows with all rows; check that more bits lose less."""
    some, every = predicted(source, text), predicted(source, text, SAMPLE_ROWS=10**6)
    assert len(some) == 14
    for name, values in every.items():
        assert values[Choice(4, 1)] < values[Choice(3, 1)] < values[Choice(2, 1)]
        for choice, value in values.items():
            assert some[name][choice] == pytest.approx(value, rel=0.15)


def test_losses_are_of_other_text_than_was_sketched_for(source, text):
    """Compute the losses by hand, with damping in the fit but not in the loss."""
    name = "model.layers.0.self_attn.v_proj"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    layer, inputs = model.get_submodule(name), []
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(TOKENS)
    x = inputs[0].flatten(0, 1).double()
    hessian = prepare_hessian((x[64:].T @ x[64:]).numpy(), prediction.DAMPING)
    dense = layer.weight.detach()
    table, codes, _ = fit(dense.numpy(), hessian, 1, 8)
    moved = (x[:64] @ (torch.from_numpy(look_up(table, codes)) - dense).double().T).square()
    rows, by_token, _ = random_sensitivity(len(dense))
    expected = float(rows @ (by_token.double() @ moved).numpy()) / 2 / 64
    found = predicted(source, text, SAMPLE_ROWS=10**6)[name]
    assert found[Choice(3, 1)] == pytest.approx(expected, rel=1e-3)


def test_predictions_do_not_depend_on_what_is_summed_at_once(source, text):
    whole = predicted(source, text)
    assert predicted(source, text, _AT_ONCE=0) == whole
    second = predicted(source, text, ignore=("model.layers.0.*",))
    assert second == {name: values for name, values in whole.items() if "layers.1" in name}


def test_predictions_that_are_no_numbers_are_refused(source, text, tmp_path):
    tensors = load_file(source / "model.safetensors")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in source.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors["model.layers.1.input_layernorm.weight"][3] = torch.inf
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match=r"layers\.1: its outputs on the calibration text"):
        convert(broken, tmp_path / "out", options(text))
