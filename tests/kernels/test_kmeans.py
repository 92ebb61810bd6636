"""Clustering is exact: it matches the plain dynamic programme, brute force and `ckmeans`."""

import itertools
from fractions import Fraction

import ckmeans
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spallm_kernels import assign, kmeans, squared_error
from spallm_kernels.reference import kmeans as reference


def brute_force(values, importance, entries):
    """The least error over all partitions into intervals, in exact arithmetic."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    points = [(Fraction(float(values[i])), Fraction(float(importance[i]))) for i in order]
    points = [(value, mass) for value, mass in points if mass > 0]

    def error(part):
        total = sum(mass for _, mass in part)
        mean = sum(value * mass for value, mass in part) / total
        return sum(mass * (value - mean) ** 2 for value, mass in part)

    n = len(points)
    cuts = min(entries, n) - 1
    return min(
        sum(error(points[i:j]) for i, j in itertools.pairwise((0, *inner, n)))
        for inner in itertools.combinations(range(1, n), cuts)
    )


single = st.floats(width=32, allow_nan=False, allow_infinity=False)
scales = st.sampled_from([2.0**-100, 2.0**-20, 1.0, 2.0**20, 2.0**100])
values_like_weights = st.one_of(
    st.lists(single, min_size=1, max_size=9),
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5]), min_size=1, max_size=9),
    st.builds(
        lambda base, steps, scale: [(base + step * 2.0**-23) * scale for step in steps],
        st.sampled_from([1.0, -1.0, 1.5]),
        st.lists(st.integers(0, 6), min_size=1, max_size=9),
        scales,
    ),
    st.builds(lambda value, n: [value] * n, single, st.integers(1, 9)),
)
masses = st.one_of(
    st.just(0.0), st.just(1.0), st.floats(2.0**-20, 2.0**20, width=32), st.just(2.0**60)
)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), values=values_like_weights, entries=st.sampled_from([2, 4, 8]))
def test_small_cases_match_brute_force(data, values, entries):
    importance = data.draw(st.lists(masses, min_size=len(values), max_size=len(values)))
    if not any(importance):
        importance = [1.0] * len(values)
    weights = np.array([values], np.float32)
    mass = np.array([importance], np.float32)
    tables, errors = kmeans(weights, mass, 1, entries)
    least = brute_force(weights[0], mass[0], entries)
    assert abs(Fraction(float(errors[0, 0])) - least) <= least * Fraction(1, 10**9)
    assert (np.diff(tables[0, 0]) >= 0).all()


@pytest.mark.parametrize("entries", [2, 4, 8, 16])
@pytest.mark.parametrize("kind", ["normal", "bf16", "integers", "outlier", "tiny", "two bunches"])
def test_rows_match_the_reference(kind, entries):
    rng = np.random.default_rng(entries)
    rows = rng.standard_normal((6, 120)).astype(np.float32)
    if kind == "bf16":
        rows = (rows.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    elif kind == "integers":
        rows = np.round(rows * 30)
    elif kind == "outlier":
        rows[:, 0] *= np.float32(1e9)
    elif kind == "tiny":
        rows *= np.float32(1e-30)
    elif kind == "two bunches":
        rows = np.where(rows > 0, 1000 + rows * 1e-3, -1000 + rows * 1e-3).astype(np.float32)
    importance = (rng.random((6, 120)) ** 6).astype(np.float32)
    importance[rng.random((6, 120)) < 0.1] = 0
    for weighting in (importance, np.ones((1, 120), np.float32)):
        tables, errors = kmeans(rows, weighting, 2, entries)
        expected_tables, expected = reference.kmeans(rows, weighting, 2, entries)
        np.testing.assert_allclose(errors, expected, rtol=1e-9, atol=0)
        if kind == "normal":  # no ties, so the optimum is unique
            np.testing.assert_allclose(tables, expected_tables, rtol=1e-12)


@pytest.mark.parametrize("entries", [4, 8, 16])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_long_rows_match_ckmeans(dtype, entries):
    rows = np.random.default_rng(0).standard_normal((8, 4096)).astype(np.float32) * 0.02
    if dtype == "bf16":
        rows = (rows.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    _, errors = kmeans(rows, np.ones((1, 4096), np.float32), 1, entries)
    for row, error in zip(rows, errors[:, 0], strict=True):
        clusters = ckmeans.ckmeans(row.astype(np.float64), entries)
        expected = sum(((part - part.mean()) ** 2).sum() for part in clusters)
        assert error == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("heavy", [1e3, 1e10, 1e14, 1e18])
def test_masses_of_very_different_size(heavy):
    """Prefix sums lose light masses next to a heavy one; the result must not."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4, 80)).astype(np.float32)
    importance = np.ones((4, 80), np.float32)
    importance[:, 7] = heavy
    spread = rng.lognormal(sigma=6, size=(4, 80)).astype(np.float32)
    for weighting in (importance, spread):
        _, errors = kmeans(rows, weighting, 1, 8)
        np.testing.assert_allclose(errors, reference.kmeans(rows, weighting, 1, 8)[1], rtol=1e-9)


def test_both_partitions_agree_on_rows_of_every_length():
    """Above 48 values the penalised way runs: it must give what the layered way gives."""
    from spallm_kernels.cpu.layered_partition import layered_partition
    from spallm_kernels.cpu.penalised_partition import penalised_partition, prefix_sums

    rng = np.random.default_rng(3)
    found = 0
    for n in range(20, 400, 7):
        values = np.sort(rng.standard_normal(n))
        mass = rng.random(n) + 0.01
        sums, best = np.empty((2, n + 1)), np.empty(n + 1)
        links, fast, careful = np.empty((4, n + 1), np.int32), *np.empty((2, 9), np.int32)
        moment = prefix_sums(values, mass, sums)
        layered_partition(values, mass, careful)
        if penalised_partition(n, moment, sums, best, links, fast):
            found += 1
            np.testing.assert_array_equal(fast, careful)
    assert found >= 50, "almost every row should be solved by the fast way"


def test_few_distinct_values_keep_their_values():
    rows = np.array([[3, 1, 3, 1, 2, 2], [5, 5, 5, 5, 5, 5]], np.float32)
    tables, errors = kmeans(rows, np.ones((1, 6), np.float32), 1, 4)
    assert tables.tolist() == [[[1, 2, 3, 3]], [[5, 5, 5, 5]]]
    assert (errors == 0).all()


def test_weights_without_importance_do_not_count():
    rows = np.array([[0, 1, 100, 101]], np.float32)
    importance = np.array([[1, 1, 0, 0]], np.float32)
    tables, _ = kmeans(rows, importance, 1, 2)
    assert tables.tolist() == [[[0, 1]]]
    uniform, _ = kmeans(rows, np.zeros((1, 4), np.float32), 1, 2)
    assert uniform.tolist() == [[[0.5, 100.5]]]


def test_threads_do_not_change_results():
    import numba

    rows = np.random.default_rng(0).standard_normal((100, 512)).astype(np.float32)
    ones = np.ones((1, 512), np.float32)
    many = kmeans(rows, ones, 2, 16)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        one = kmeans(rows, ones, 2, 16)
    finally:
        numba.set_num_threads(before)
    np.testing.assert_array_equal(many[0], one[0])
    np.testing.assert_array_equal(many[1], one[1])


@pytest.mark.parametrize(
    ("weights", "importance", "groups", "message"),
    [
        (np.full((1, 4), np.nan), np.ones((1, 4)), 1, "weights must be finite"),
        (np.ones((1, 4)), np.full((1, 4), -1), 1, "finite and non-negative"),
        (np.ones((1, 4)), np.ones((1, 3)), 1, "importance must be"),
        (np.ones((1, 4)), np.ones((1, 4)), 3, "groups must divide"),
    ],
)
def test_unusable_input_is_refused(weights, importance, groups, message):
    with pytest.raises(ValueError, match=message):
        kmeans(weights.astype(np.float32), importance.astype(np.float32), groups, 2)


@pytest.mark.parametrize("groups", [1, 3])
def test_assign_matches_the_reference(groups):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((7, 60)).astype(np.float32)
    tables = np.sort(np.round(rng.standard_normal((7, groups, 8)) * 64) / 64).astype(np.float32)
    rows[:, 0] = (tables[:, 0, 2] + tables[:, 0, 3]) / 2  # a tie, exact in float32
    codes = assign(rows, tables)
    np.testing.assert_array_equal(codes, reference.assign(rows, tables))
    chosen = np.take_along_axis(
        np.repeat(tables, 60 // groups, axis=1), codes[:, :, None].astype(int), axis=2
    )[:, :, 0]
    distance = np.abs(rows[:, :, None] - np.repeat(tables, 60 // groups, axis=1)).min(axis=2)
    np.testing.assert_allclose(np.abs(rows - chosen), distance, rtol=1e-6)
    sums = squared_error(rows, tables, codes)
    np.testing.assert_allclose(sums[:, 0], ((rows - chosen).astype(float) ** 2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(sums[:, 1], (rows.astype(float) ** 2).sum(1), rtol=1e-12)
