"""Gradients of tables from the gradient of a dense weight, several codes at a time."""

import pytest
import torch

from helpers.sketches import random, random_sketch, relative_error
from spallm_kernels.cpu import bins, linear, portable
from spallm_kernels.reference import linear as reference

BITS = [2, 3, 4]
#: Rows, columns and groups.
SHAPES = [(1, 256, 1), (5, 320, 1), (3, 768, 3), (2, 2048, 2)]


@pytest.fixture
def ran(monkeypatch):
    """The modules whose `table_grad` ran, in turn."""
    names = []

    def spy(module):
        original = module.table_grad

        def table_grad(*arguments):
            names.append(module.__name__.rpartition(".")[2])
            return original(*arguments)

        monkeypatch.setattr(module, "table_grad", table_grad)

    spy(bins)
    spy(portable)
    return names


@pytest.mark.parametrize("bits", BITS)
def test_sums_of_integers_are_exact(ran, bits):
    """So each gradient is added once, to the entry of its own code."""
    generator = torch.Generator().manual_seed(bits)
    for rows, columns, groups in SHAPES:
        sketch = random_sketch(bits, groups, rows, columns)
        gradient = torch.randint(-99, 100, (rows, columns), generator=generator)
        expected = reference.table_grad(gradient.double(), sketch.index_map, sketch.table)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            found = linear.table_grad(gradient.to(dtype), sketch.index_map, sketch.table)
            assert found.dtype == torch.float32
            assert torch.equal(found.double(), expected)
    assert set(ran) == {"bins"}


@pytest.mark.parametrize("bits", BITS)
def test_one_gradient_goes_to_the_entry_of_its_code(bits):
    sketch = random_sketch(bits, 1, 1, 256)
    for column in (0, 1, 2, 3, 5, 7, 63, 64, 254, 255):
        gradient = torch.zeros(1, 256)
        gradient[0, column] = 3
        found = bins.table_grad(gradient, sketch.index_map, sketch.table)
        expected = torch.zeros(1, 1, 1 << bits)
        expected[0, 0, sketch.codes[0, column].long()] = 3
        assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", BITS)
def test_sums_equal_those_in_float64(bits):
    for rows, columns, groups in SHAPES:
        sketch = random_sketch(bits, groups, rows, columns)
        gradient = random(rows, columns, dtype=torch.float32)
        found = bins.table_grad(gradient.float(), sketch.index_map, sketch.table)
        expected = reference.table_grad(gradient, sketch.index_map, sketch.table)
        assert relative_error(found, expected) < 1e-6


def test_gradients_and_index_maps_may_be_views():
    sketch = random_sketch(4, 1, 6, 256)
    gradient = random(256, 12, dtype=torch.float32).float().T
    found = bins.table_grad(
        gradient[::2], sketch.index_map.repeat_interleave(2, 0)[::2], sketch.table
    )
    expected = reference.table_grad(gradient[::2].double(), sketch.index_map, sketch.table)
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize(
    ("bits", "groups", "columns", "dtype", "seed"),
    [
        (4, 1, 192, torch.float32, None),  # too few columns to pay
        (4, 4, 768, torch.float32, None),
        (4, 1, 257, torch.float32, None),  # no whole pieces
        (5, 1, 256, torch.float32, None),
        (1, 1, 256, torch.float32, None),
        (4, 1, 256, torch.float64, None),
        (4, 1, 256, torch.float32, 5),
    ],
)
def test_the_plain_loop_does_the_rest(ran, bits, groups, columns, dtype, seed):
    sketch = random_sketch(bits, groups, 7, columns, hash_seed=seed)
    gradient = random(7, columns, dtype=dtype)
    found = linear.table_grad(
        gradient.to(dtype), sketch.index_map, sketch.table, hash_seed=seed, first_row=0
    )
    expected = reference.table_grad(gradient, sketch.index_map, sketch.table, hash_seed=seed)
    assert ran == ["portable"]
    assert relative_error(found, expected) < (1e-6 if dtype == torch.float32 else 1e-12)
