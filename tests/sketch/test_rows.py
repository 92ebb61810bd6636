"""Rows sketched with importance: the tables of the reference k-means, and weighted sums."""

import numpy as np
import pytest

from spallm_convert.sketch.rows import sketch_rows
from spallm_formats import SketchedModule, SketchMetadata, unpack
from spallm_kernels import squared_error
from spallm_kernels.reference import kmeans as reference

ROWS, COLUMNS, GROUPS = 5, 48, 2


def draw(rows_of_importance):
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    return weights, rng.lognormal(sigma=2, size=(rows_of_importance, COLUMNS)).astype(np.float32)


def sketched(weights, importance, bits=2, table_dtype="float32"):
    module = SketchedModule(
        in_features=COLUMNS, out_features=ROWS, bits=bits, groups_per_row=GROUPS
    )
    metadata = SketchMetadata(
        mapping="cluster", table_dtype=table_dtype, hash_seed=0, modules={"layer": module}
    )
    return sketch_rows(weights, module, metadata, 0, importance=importance)


def looked_up(table, codes):
    """Return the values that codes stand for, [rows, columns]."""
    wide = np.repeat(table, COLUMNS // GROUPS, axis=1)
    return np.take_along_axis(wide, codes[:, :, None].astype(int), axis=2)[:, :, 0]


@pytest.mark.parametrize("rows_of_importance", [1, ROWS])
@pytest.mark.parametrize("bits", [2, 3])
def test_tables_are_those_of_the_reference(bits, rows_of_importance):
    weights, importance = draw(rows_of_importance)
    found = sketched(weights, importance, bits)
    tables, _ = reference.kmeans(weights, importance, GROUPS, 1 << bits)
    np.testing.assert_allclose(found.rounded, tables, rtol=1e-6)
    np.testing.assert_array_equal(found.table, found.rounded)
    codes = unpack(found.index_map, bits, COLUMNS)
    np.testing.assert_array_equal(codes, reference.assign(weights, found.rounded))
    plain = sketched(weights, None, bits)
    assert not np.array_equal(found.table, plain.table)


@pytest.mark.parametrize("table_dtype", ["float32", "bfloat16"])
def test_sums_are_of_weights_and_then_of_outputs(table_dtype):
    weights, importance = draw(ROWS)
    found = sketched(weights, importance, table_dtype=table_dtype)
    errors = weights - looked_up(found.rounded, unpack(found.index_map, 2, COLUMNS)).astype(float)
    expected = [(c * x**2).sum(1) for c in (1, importance) for x in (errors, weights.astype(float))]
    np.testing.assert_allclose(found.sums, np.stack(expected, axis=1), rtol=1e-12)
    plain = sketched(weights, None, table_dtype=table_dtype)
    assert plain.sums.shape == (ROWS, 2)
    assert (found.sums[:, 0] > plain.sums[:, 0]).all()  # the price in the weights


@pytest.mark.parametrize("rows_of_importance", [1, ROWS])
def test_squared_error_counts_each_square_as_often_as_its_importance(rows_of_importance):
    weights, importance = draw(rows_of_importance)
    rng = np.random.default_rng(1)
    tables = rng.standard_normal((ROWS, GROUPS, 8)).astype(np.float32)
    codes = rng.integers(0, 8, weights.shape).astype(np.uint8)
    found = squared_error(weights, tables, codes, importance)
    wide, counts = weights.astype(np.float64), importance.astype(np.float64)
    errors = (counts * (wide - looked_up(tables, codes)) ** 2).sum(1)
    np.testing.assert_allclose(found[:, 0], errors, rtol=1e-12)
    np.testing.assert_allclose(found[:, 1], (counts * wide**2).sum(1), rtol=1e-12)
    ones = np.ones((rows_of_importance, COLUMNS), np.float32)
    np.testing.assert_array_equal(
        squared_error(weights, tables, codes, ones), squared_error(weights, tables, codes)
    )
