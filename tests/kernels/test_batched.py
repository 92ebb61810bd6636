"""Calibrated sketching in torch gives the same results as numba, here on the CPU."""

import itertools

import numpy as np
import pytest
import torch

import spallm_kernels
from helpers.hessians import correlated_hessian, sorted_tables, weight_rows
from spallm_kernels import batched
from spallm_kernels.batched import quadratic

SHAPES = [(5, 12, 1, 2), (17, 40, 2, 3), (65, 300, 4, 4), (33, 136, 2, 2)]


def layer(rows, n, groups, bits, **hessian):
    """NumPy arrays and torch tensors of one layer: weights, tables, codes, Hessian."""
    weights = weight_rows(rows, n, seed=n)
    table = sorted_tables(weights, groups, 2**bits, seed=bits)
    codes = spallm_kernels.assign(weights, table)
    hessian = correlated_hessian(n, n, **hessian)
    arrays = weights, table, codes, spallm_kernels.prepare_hessian(hessian, 0.01)
    tensors = [torch.from_numpy(array) for array in arrays[:3]]
    return arrays, (*tensors, batched.prepare_hessian(torch.from_numpy(hessian), 0.01))


def losses(weights, table, codes, prepared):
    dense = spallm_kernels.look_up(np.asarray(table), np.asarray(codes))
    return spallm_kernels.quadratic_loss(np.asarray(weights), dense, np.asarray(prepared.full))


@pytest.mark.parametrize("dead", [(), (2, 3)])
@pytest.mark.parametrize("n", [1, 30, 200])
def test_hessians_match(n, dead):
    hessian = correlated_hessian(n, 0, dead=dead if n > 3 else ())
    expected = spallm_kernels.prepare_hessian(hessian, 0.02)
    found = batched.prepare_hessian(torch.from_numpy(hessian), 0.02)
    np.testing.assert_array_equal(found.order, expected.order)
    np.testing.assert_allclose(found.full, expected.full, rtol=1e-12)
    np.testing.assert_allclose(found.pivots, expected.pivots, rtol=1e-8)
    np.testing.assert_allclose(found.factor, expected.factor, rtol=1e-4, atol=1e-6)
    zero = batched.prepare_hessian(torch.zeros(n, n), 0.02)
    assert torch.equal(zero.full, torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize(
    ("hessian", "damping", "message"),
    [
        (torch.ones(2, 3), 0.1, "must be \\[n, n\\]"),
        (torch.full((2, 2), torch.nan), 0.1, "must be finite"),
        (torch.eye(2), 0.0, "damping must be"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0.1, "not positive definite"),
    ],
)
def test_unusable_hessians_are_refused(hessian, damping, message):
    with pytest.raises(ValueError, match=message):
        batched.prepare_hessian(hessian, damping)


@pytest.mark.parametrize("power", [None, 2.5])
def test_importance_matches(power):
    arrays, tensors = layer(5, 40, 1, 2, dead=(1,))
    expected = spallm_kernels.importance(arrays[3], power)
    np.testing.assert_allclose(batched.importance(tensors[3], power), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_compensate_matches(shape):
    arrays, (weights, table, _, hessian) = layer(*shape, dead=(1,))
    expected = spallm_kernels.compensate(*arrays[:2], arrays[3])
    found = batched.compensate(weights, table, hessian)
    assert found.dtype == torch.uint8
    # Another order of float32 sums may decide differently for a weight close to a middle.
    assert (found.numpy() == expected).mean() > 0.99
    ours, theirs = (losses(*arrays[:2], codes, arrays[3]).sum() for codes in (found, expected))
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("sweeps", [0, 1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_descend_matches(shape, sweeps, monkeypatch):
    monkeypatch.setattr(quadratic, "SCRATCH", 7 * shape[1])  # losses of seven rows at a time
    arrays, tensors = layer(*shape)
    expected = spallm_kernels.descend(*arrays, sweeps)
    found = batched.descend(*tensors, sweeps)
    assert (found.numpy() == expected).mean() > 0.99
    before = losses(*arrays)
    after = losses(*arrays[:2], found, arrays[3])
    assert (after <= before * (1 + 1e-9)).all()
    assert after.sum() == pytest.approx(losses(*arrays[:2], expected, arrays[3]).sum(), rel=1e-4)
    assert torch.equal(tensors[2], torch.from_numpy(arrays[2])), "the start must stay as it was"


@pytest.mark.parametrize("scratch", [1, quadratic.SCRATCH])
@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_least_squares_matches(shape, rank, scratch, monkeypatch):
    monkeypatch.setattr(quadratic, "SCRATCH", scratch)  # 1: one row at a time
    arrays, tensors = layer(*shape, rank=rank)
    expected = spallm_kernels.least_squares(*arrays)
    table, codes = batched.least_squares(*tensors)
    assert (table.diff(dim=2) >= 0).all()
    after = losses(arrays[0], table, codes, arrays[3])
    assert (after <= losses(*arrays) * (1 + 1e-9)).all()
    np.testing.assert_allclose(after, losses(arrays[0], *expected, arrays[3]), rtol=1e-4)


def test_look_up_and_loss_match():
    arrays, (weights, table, codes, hessian) = layer(17, 40, 2, 3)
    dense = batched.look_up(table, codes)
    np.testing.assert_array_equal(dense, spallm_kernels.look_up(*arrays[1:3]))
    np.testing.assert_allclose(
        batched.quadratic_loss(weights, dense, hessian.full), losses(*arrays), rtol=1e-9
    )


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_fit_matches(shape):
    (array, _, _, prepared), (weights, _, _, hessian) = layer(*shape, dead=(1,))
    _, _, groups, bits = shape
    powers = (2.0, None)
    expected = spallm_kernels.fit(array, prepared, groups, 2**bits, powers=powers)
    table, codes, steps = batched.fit(weights, hessian, groups, 2**bits, powers=powers)
    assert steps[0][1] == pytest.approx(expected.losses[0][1], rel=1e-9)
    assert [name for name, _ in steps[:4]] == [name for name, _ in expected.losses[:4]]
    assert all(after <= before for (_, before), (_, after) in itertools.pairwise(steps))
    total = losses(array, table, codes, prepared).sum()
    assert total == pytest.approx(steps[-1][1], rel=1e-9)
    # Rows whose codes once differ end with other results, which are about as good.
    assert total == pytest.approx(expected.losses[-1][1], rel=0.01)
    with pytest.raises(ValueError, match="powers must name at least one"):
        batched.fit(weights, hessian, groups, 2**bits, powers=())
