"""Products in the tile registers of AMX, and when they are chosen."""

import ctypes
import platform

import pytest
import torch

from helpers.sketches import random, random_sketch, relative_error
from spallm_kernels import lut_linear
from spallm_kernels.cpu import linear, matrix, vector_units
from spallm_kernels.cpu.vector_units import AMX, AVX512, CHOICE, available_units

needs_amx = pytest.mark.skipif("amx" not in available_units(), reason="needs AMX")
HALF = torch.bfloat16
#: Columns and groups: whole steps, a last step, no whole step.
SHAPES = [(64, 1), (352, 1), (120, 5), (47, 1), (5, 1)]
TOKENS = [3, 16, 17, 40, 100]
KINDS = [(4, torch.bfloat16), (3, torch.float32), (2, torch.bfloat16)]


@pytest.fixture
def unit(monkeypatch):
    """Return a function that sets the unit, as if this machine had it."""
    monkeypatch.delenv(CHOICE, raising=False)

    def choose(unit):
        monkeypatch.setattr(matrix, "host_unit", lambda: unit)

    return choose


@needs_amx
@pytest.mark.parametrize(("bits", "dtype"), KINDS)
def test_products_equal_those_in_float64(bits, dtype):
    for columns, groups in SHAPES:
        x = random(max(TOKENS), columns, dtype=HALF).bfloat16()
        for rows in (1, 16, 37):
            sketch = random_sketch(bits, groups, rows, columns, dtype=HALF)
            table, bias = sketch.table.to(dtype), random(rows, dtype=HALF)
            expected = x.double() @ sketch.dense().T + bias
            for tokens in TOKENS:
                y = matrix.decode(x[:tokens], sketch.index_map, table, bias.float())
                assert y.dtype == HALF
                assert relative_error(y, expected[:tokens]) < 4e-3  # rounded to bfloat16


@needs_amx
def test_entries_are_rounded_to_bfloat16():
    sketch = random_sketch(4, 1, 16, 64)
    x, table = random(3, 64, dtype=HALF).bfloat16(), sketch.table.float()
    rounded = matrix.decode(x, sketch.index_map, table.bfloat16())
    assert torch.equal(matrix.decode(x, sketch.index_map, table), rounded)


@needs_amx
@pytest.mark.parametrize("threshold", ["SERIAL", "OWN_INPUTS"])
def test_a_token_has_the_same_bits_in_every_batch(monkeypatch, threshold):
    """With several threads or one, and inputs that are packed once or by every thread."""
    sketch = random_sketch(4, 2, 70, 352)
    x, table = random(100, 352, dtype=HALF).bfloat16(), sketch.table.bfloat16()
    expected = matrix.decode(x, sketch.index_map, table)
    module = matrix.vectorized if threshold == "SERIAL" else matrix
    monkeypatch.setattr(module, threshold, 0)
    for tokens in (*TOKENS, 64):
        found = matrix.decode(x[:tokens], sketch.index_map, table)
        assert torch.equal(found, expected[:tokens])


@needs_amx
def test_inputs_that_are_not_contiguous():
    sketch = random_sketch(4, 1, 16, 64)
    wide = random(4, 128, dtype=HALF).bfloat16()
    x, table = wide[:, ::2], sketch.table.bfloat16()
    given = sketch.index_map, table
    assert torch.equal(matrix.decode(x, *given), matrix.decode(x.contiguous(), *given))


@needs_amx
def test_the_layer_uses_tiles():
    sketch = random_sketch(4, 1, 40, 64)
    x, table = random(2, 4, 64, dtype=HALF).bfloat16(), sketch.table.bfloat16()
    y = lut_linear(x, sketch.index_map, table)
    flat = matrix.decode(x.view(8, 64), sketch.index_map, table)
    assert torch.equal(y.view(8, 40), flat)


def test_when_tiles_are_used(unit):
    table = torch.zeros(8, 1, 16, dtype=HALF)
    x = torch.zeros(3, 64, dtype=HALF)
    unit(AMX)
    assert matrix.supports(x, table, None)
    assert matrix.supports(x, table.float(), None)
    assert not matrix.supports(x[:2], table, None)
    assert not matrix.supports(x.float(), table, None)
    assert not matrix.supports(x.half(), table, None)
    assert not matrix.supports(x, table.half(), None)
    assert not matrix.supports(x, table, 5)
    assert not matrix.supports(x, table.repeat(1, 1, 2), None)
    assert linear.decode_tokens(x, table, hashed=False) == linear.MATRIX_TOKENS
    for other in (AVX512, None):
        unit(other)
        assert not matrix.supports(x, table, None)


def test_the_system_is_asked_for_tile_registers(monkeypatch):
    """Its answer decides. Elsewhere than on Linux there is nobody to ask."""
    asked = []

    class Library:
        answer = 0

        def syscall(self, *numbers):
            asked.append(numbers)
            return self.answer

    ask = vector_units.permit_matrix.__wrapped__
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert ask()
    Library.answer = -1
    assert not ask()
    assert asked == 2 * [(158, 0x1023, 18)]
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert not ask()
    assert len(asked) == 2
