"""Calibration with the mapping `hash`: codes are computed, and tables are optimal for them."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.calibration import calibrated
from helpers.hessians import correlated_hessian, weight_rows
from spallm_convert import OptionError, SketchConfig, convert, load_sketched
from spallm_convert.calibration.layers import DAMPING, prepare_inputs, sketch_layer
from spallm_formats import SketchedModule, SketchMetadata
from spallm_kernels import hash_codes, look_up


def sketched(rows, columns, groups, bits, *, seed=3, without=(), weights=None):
    """Return weights, Hessian and sketch of a layer whose targets are its weights."""
    weights = weight_rows(rows, columns, seed=1) if weights is None else weights
    hessian = torch.from_numpy(correlated_hessian(columns, 2))
    shape = {"out_features": rows, "in_features": columns}
    module = SketchedModule(bits=bits, groups_per_row=groups, **shape)
    metadata = SketchMetadata(
        mapping="hash", table_dtype="float32", hash_seed=seed, modules={"layer": module}
    )
    inputs = prepare_inputs(hessian, hessian.clone(), without)
    layer = sketch_layer(torch.from_numpy(weights), inputs, module, metadata, without)
    return weights, hessian.numpy(), layer


@pytest.mark.parametrize("shape", [(5, 24, 1, 2), (7, 60, 2, 3), (3, 40, 4, 4)])
def test_tables_are_the_least_squares_optimum(shape):
    """Compare with numpy.linalg.lstsq, on a square root of the damped Hessian."""
    rows, columns, groups, bits = shape
    weights, hessian, layer = sketched(*shape, without=("correction",))
    assert layer.rows.index_map.shape == (rows, 0)
    codes = hash_codes(rows, columns, bits, 3)
    np.testing.assert_array_equal(layer.dense.numpy(), look_up(layer.rows.rounded, codes))
    damped = hessian + DAMPING * hessian.diagonal().mean() * np.eye(columns)
    root = np.linalg.cholesky(damped).T
    unknown = np.arange(columns) // (columns // groups) * 2**bits
    for row in range(rows):
        choice = np.zeros((columns, groups * 2**bits))
        choice[np.arange(columns), unknown + codes[row]] = 1
        best = np.linalg.lstsq(root @ choice, root @ weights[row])[0]
        used = choice.any(axis=0)
        found = layer.rows.rounded[row].ravel()
        np.testing.assert_allclose(found[used], best[used], rtol=1e-3, atol=1e-4)


def test_without_least_squares_tables_are_means():
    weights, _, layer = sketched(5, 24, 1, 2, without=("correction", "least-squares"))
    codes = hash_codes(5, 24, 2, 3)
    for row, code in np.ndindex(5, 4):
        if (codes[row] == code).any():
            mean = weights[row, codes[row] == code].mean()
            assert layer.rows.rounded[row, 0, code] == pytest.approx(mean, rel=1e-5)


def test_weights_that_are_no_numbers_are_refused():
    weights = weight_rows(5, 24, seed=1)
    weights[2, 3] = np.nan
    with pytest.raises(ValueError, match="weights must be finite"):
        sketched(5, 24, 1, 2, weights=weights)


def test_calibrated_models_are_nearer_to_the_dense_one(source, text, tmp_path):
    given = {"bits": 4, "groups_per_row": 1, "mapping": "hash", "seed": 5}
    config = calibrated(text, **given, samples=16, seqlen=32)
    report = convert(source, tmp_path / "calibrated", config)
    convert(source, tmp_path / "plain", SketchConfig(effort="fast", **given))
    tokens = torch.randint(2, 128, (8, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dense, plain, fitted = (
            load(tmp_path / name, tokens) for name in (source, "plain", "calibrated")
        )
    assert (fitted - dense).norm() < 0.95 * (plain - dense).norm()
    assert 0 < report.totals["relative_output_error"] < 1
    tensors = load_file(tmp_path / "calibrated/model.safetensors")
    assert all(tensors[f"{module['name']}.weight"].numel() == 0 for module in report.modules)


def load(folder, tokens):
    from transformers import AutoModelForCausalLM

    sketched = (folder / "conversion.json").exists()
    opened = load_sketched if sketched else AutoModelForCausalLM.from_pretrained
    return opened(folder, dtype=torch.float32)(tokens).logits


@pytest.mark.parametrize("step", ["compensation", "descent"])
def test_steps_that_choose_codes_cannot_be_left_out(step, text):
    with pytest.raises(OptionError, match=f"without {step}: only for the mapping 'cluster'"):
        calibrated(text, mapping="hash", without=(step,))
