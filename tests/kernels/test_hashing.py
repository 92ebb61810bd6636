"""The hash mapping: the fast functions match the reference, and the mixer spreads codes well."""

import numpy as np
import pytest
import torch

from spallm_kernels import hash_codes, hash_table
from spallm_kernels.reference import hashing as reference
from spallm_kernels.reference import linear


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_codes_agree_everywhere(bits, seed):
    codes = hash_codes(9, 70, bits, seed, first_row=5)
    np.testing.assert_array_equal(codes, reference.hash_codes(9, 70, bits, seed, first_row=5))
    on_torch = linear.hash_codes(9, 70, bits, seed, 5, torch.device("cpu"))
    np.testing.assert_array_equal(codes, on_torch.numpy())
    whole = hash_codes(14, 70, bits, seed)
    np.testing.assert_array_equal(codes, whole[5:])


def test_codes_are_even_and_independent_of_row_and_column():
    codes = hash_codes(512, 512, 4, 0)
    share = np.bincount(codes.ravel(), minlength=16) / codes.size
    assert np.abs(share - 1 / 16).max() < 0.002  # 4 standard deviations of a fair draw
    for shifted in (np.roll(codes, 1, axis=0), np.roll(codes, 1, axis=1), codes[::-1, ::-1]):
        assert abs((codes == shifted).mean() - 1 / 16) < 0.003


@pytest.mark.parametrize("groups", [1, 2])
def test_table_is_the_least_squares_optimum(groups):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 40)).astype(np.float32)
    table = hash_table(rows, groups, 2, seed=7, first_row=3)
    np.testing.assert_allclose(
        table, reference.hash_table(rows, groups, 2, 7, 3), rtol=1e-12, atol=1e-15
    )
    codes = hash_codes(6, 40, 2, 7, 3).reshape(6, groups, -1)
    residual = rows.reshape(codes.shape) - np.take_along_axis(table, codes.astype(int), axis=2)
    for code in range(4):  # at the optimum the residuals of every bucket add up to zero
        np.testing.assert_allclose((residual * (codes == code)).sum(axis=2), 0, atol=1e-6)


def test_a_bucket_that_nothing_hits_is_zero():
    table = hash_table(np.ones((1, 1), np.float32), 1, 4, 0)
    assert sorted(table.ravel()) == [0] * 15 + [1]
