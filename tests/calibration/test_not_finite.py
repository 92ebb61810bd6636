"""NaN and infinite values of the model end a calibrated conversion, wherever they first occur."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.blocks import open_blocks
from helpers.calibration import calibrated, save_source
from spallm_convert import CalibrationError, convert
from spallm_convert.calibration.allocation import prediction
from spallm_convert.calibration.blocks.stages import Streams
from spallm_convert.calibration.healing.distillation import Divergence
from spallm_convert.calibration.healing.reconstruction import reconstruct
from spallm_convert.calibration.healing.tuning import TableTuner
from spallm_convert.runtime.linear import SketchedLinear
from spallm_formats import SketchedModule

DOWN = "model.layers.1.mlp.down_proj"


def spoiled(folder, name, value):
    save_source(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name][..., 0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("model.norm.weight", {"heal": 2}),
        ("lm_head.weight", {"heal": 2}),
        ("model.norm.weight", {"target_bits": 9}),
        ("model.embed_tokens.weight", {}),
        ("model.layers.1.post_attention_layernorm.weight", {}),
        (DOWN + ".weight", {"ignore": (DOWN,)}),
        (DOWN + ".weight", {"ignore": (DOWN,), "target_bits": 9}),
        (DOWN + ".weight", {"ignore": (DOWN,), "heal": 2}),
    ],
)
def test_a_conversion_ends_with_an_error(tmp_path, text, name, changes, value):
    source = spoiled(tmp_path / "source", name, value)
    config = calibrated(text, samples=8, seqlen=32, **changes)
    with pytest.raises(CalibrationError, match="not all finite"):
        convert(source, tmp_path / "out", config, device="cpu")
    assert not (tmp_path / "out/config.json").exists()


def test_the_divergence_is_nan_if_either_prediction_is():
    clean = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    for place in (0, 1):
        both = [clean.clone(), clean.clone()]
        both[place][3, 2] = math.nan
        assert Divergence.apply(*both).isnan()


def test_the_divergence_counts_no_token_that_the_dense_model_rules_out():
    clean = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    clean[:, 2] = -math.inf
    assert Divergence.apply(clean, clean).item() == 0


def test_hidden_states_of_training_batches_count_too(tmp_path):
    """Only the second batch is not finite, and the held-out batch is the first."""
    folder = save_source(tmp_path / "source")
    tokens = torch.randint(0, 127, (8, 16), generator=torch.Generator().manual_seed(0))
    tokens[2, 3] = 127
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][127] = math.inf
    save_file(tensors, weights, metadata={"format": "pt"})
    blocks = open_blocks(folder, tokens)
    inputs = blocks.take_inputs()
    streams = Streams(inputs, list(inputs))
    with pytest.raises(CalibrationError, match=r"model.layers.0: its outputs on the healing text"):
        reconstruct(blocks, 0, lambda path, dense: None, streams, dtype=torch.bfloat16, seed=0)


def test_training_without_any_finite_gradient_is_an_error():
    shape = SketchedModule(in_features=16, out_features=4, bits=2, groups_per_row=1)
    layer = SketchedLinear(shape, bias=None, table_dtype=torch.float32, hash_seed=0)
    nn.init.normal_(layer.weight_table)
    tuner = TableTuner(nn.Sequential(layer), 3, 1.0, torch.bfloat16)
    tuner.check_steps("block")  # nothing was skipped yet
    for value in (math.nan, math.inf):
        tuner.step(layer.weight_table.sum() * value)
    with pytest.raises(CalibrationError, match="block: not one of 2 gradients"):
        tuner.check_steps("block")
    tuner.step(layer.weight_table.sum())
    tuner.check_steps("block")


def test_predicted_losses_that_are_not_finite(source, text, tmp_path, monkeypatch):
    """Errors whose squares overflow stand for any other reason."""
    trial = prediction._try

    def large(*arguments):
        return {
            name: found._replace(errors=found.errors + 1e30)
            for name, found in trial(*arguments).items()
        }

    monkeypatch.setattr(prediction, "_try", large)
    with pytest.raises(CalibrationError, match="predicted losses are not all finite"):
        convert(
            source,
            tmp_path / "out",
            calibrated(text, samples=8, seqlen=32, target_bits=9),
            device="cpu",
        )
