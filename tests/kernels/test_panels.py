"""Gradients of inputs and tables without a dense weight, on every vector unit of this machine."""

import pytest
import torch

from helpers.sketches import TOLERANCE, passes, random, random_sketch, relative_error
from spallm_kernels import lut_linear, operators
from spallm_kernels.cpu import linear, panels
from spallm_kernels.cpu.vector_units import CHOICE, PORTABLE, host_unit
from spallm_kernels.reference import linear as reference

BITS = [2, 3, 4]
TOKENS = [1, 5, 6, 7, 130]
#: Rows, columns and groups. 64 rows are looked up at a time, 24 rows are added up at a time.
SHAPES = [(1, 64, 1), (23, 128, 2), (24, 64, 1), (67, 192, 1), (130, 256, 4)]


@pytest.fixture
def ran(monkeypatch):
    """The functions of `panels.py` that ran, in turn."""
    names = []

    def spy(name):
        original = getattr(panels, name)

        def function(*arguments):
            names.append(name)
            return original(*arguments)

        monkeypatch.setattr(panels, name, function)

    spy("input_grad")
    spy("table_grad")
    return names


def integers(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape, generator=generator).float()


@pytest.mark.parametrize("bits", BITS)
def test_input_gradients_equal_those_in_float64(unit, bits):
    for rows, columns, groups in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            sketch = random_sketch(bits, groups, rows, columns, dtype=dtype)
            table, y_grad = sketch.table.to(dtype), random(130, rows, dtype=torch.float32)
            expected = y_grad @ sketch.dense()
            for tokens in TOKENS:
                some = y_grad[:tokens].float()
                assert linear.can_differentiate(some, table, columns, None)
                found = panels.input_grad(some, sketch.index_map, table, columns)
                assert found.shape == (tokens, columns)
                assert relative_error(found, expected[:tokens]) < 1e-6


@pytest.mark.parametrize("bits", BITS)
def test_input_gradients_of_integers_are_exact(unit, bits):
    """So each weight is used once, with the gradient of its own row."""
    for rows, columns, groups in SHAPES:
        sketch = random_sketch(bits, groups, rows, columns)
        table = integers(rows, groups, 1 << bits, seed=1)
        for tokens in (0, *TOKENS):
            y_grad = integers(tokens, rows, seed=tokens)
            found = panels.input_grad(y_grad, sketch.index_map, table, columns)
            assert torch.equal(found, y_grad @ sketch.dense(table))


@pytest.mark.parametrize("bits", BITS)
def test_table_gradients_equal_those_in_float64_and_are_exact_for_integers(unit, bits):
    for rows, columns, groups in SHAPES:
        sketch = random_sketch(bits, groups, rows, columns)
        table = sketch.table.float()
        for tokens in (0, *TOKENS):
            y_grad, x = integers(tokens, rows, seed=1), integers(tokens, columns, seed=2)
            for exact in (True, False):
                if not exact:
                    y_grad, x = y_grad + random(rows).float(), x + random(columns).float()
                weight_grad = y_grad.double().T @ x.double()
                expected = reference.table_grad(weight_grad, sketch.index_map, sketch.table)
                found = panels.table_grad(y_grad, x, sketch.index_map, table)
                assert found.dtype == torch.float32
                if exact or not tokens:
                    assert torch.equal(found.double(), expected)
                else:
                    assert relative_error(found, expected) < 1e-6


def test_tensors_may_be_views(unit):
    sketch = random_sketch(4, 1, 9, 64)
    y_grad, x, table = integers(9, 14, seed=1).T, integers(64, 14, seed=2).T, sketch.table.float()
    index_map, wide = sketch.index_map.repeat_interleave(2, 0), table.repeat_interleave(2, 0)
    found = panels.input_grad(y_grad[::2], index_map[::2], wide[::2], 64)
    assert relative_error(found, y_grad[::2].double() @ sketch.dense(table.double())) < 1e-6
    found = panels.table_grad(y_grad[::2], x[::2], index_map[::2], wide[::2])
    weight_grad = y_grad[::2].T @ x[::2]
    assert torch.equal(found, reference.table_grad(weight_grad, sketch.index_map, table))


CASES = {
    "served": {},
    "several groups": {"groups": 2, "columns": 256},
    "tables of 16 bits": {"table_dtype": torch.bfloat16},
    "hashed codes": {"hash_seed": 5},
    "groups of no whole panels": {"groups": 3, "columns": 96},
    "columns of no whole panels": {"columns": 65},
    "5 bits": {"bits": 5},
    "16-bit inputs": {"dtype": torch.bfloat16},
    "float64 inputs": {"dtype": torch.float64},
    "float64 tables": {"table_dtype": torch.float64},
}
SERVED = {"served", "several groups", "tables of 16 bits"}


def check_gradients(
    bits=4, groups=1, columns=128, dtype=torch.float32, table_dtype=torch.float32, hash_seed=None
):
    """Compare a product and its gradients with those of the dense weight in float64."""
    rounded = torch.bfloat16 if torch.bfloat16 in (dtype, table_dtype) else torch.float32
    sketch = random_sketch(bits, groups, 19, columns, dtype=rounded, hash_seed=hash_seed)
    inputs = [random(7, columns, dtype=dtype), random(19, dtype=dtype), random(7, 19, dtype=dtype)]
    x, bias, y_grad = (tensor.to(dtype) for tensor in inputs)
    found = passes(
        lambda x, table, bias: lut_linear(
            x, sketch.index_map, table, bias, hash_seed=hash_seed
        ),
        x, sketch.table.to(table_dtype), bias, y_grad,
    )  # fmt: skip
    expected = passes(
        lambda x, table, bias: torch.nn.functional.linear(x, sketch.dense(table), bias),
        inputs[0], sketch.table, inputs[1], inputs[2],
    )  # fmt: skip
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < TOLERANCE[rounded]


@pytest.mark.parametrize("case", CASES)
def test_whatever_is_not_supported_takes_the_general_path(unit, ran, case):
    check_gradients(**CASES[case])
    assert ran == (["input_grad", "table_grad"] if case in SERVED else [])


def test_portable_loops_take_the_general_path(monkeypatch, ran):
    monkeypatch.setenv(CHOICE, PORTABLE)
    host_unit.cache_clear()
    try:
        check_gradients()
    finally:
        host_unit.cache_clear()
    assert ran == []


@pytest.mark.parametrize("elements", [1, 96 * 5, 96 * 18, 96 * 19])
@pytest.mark.parametrize("hash_seed", [None, 5])
def test_the_general_path_takes_any_number_of_rows_at_a_time(
    unit, monkeypatch, ran, hash_seed, elements
):
    """Several blocks, of which the last may be partial; hashes go on with the next row."""
    blocks = []
    original = operators._blocks
    monkeypatch.setattr(operators, "CPU_ELEMENTS", elements)
    monkeypatch.setattr(
        operators, "_blocks", lambda *shape: blocks.append(original(*shape)) or blocks[-1]
    )
    check_gradients(groups=3, columns=96, hash_seed=hash_seed)
    assert ran == []
    rows = max(1, elements // 96)
    assert [[len(range(19)[part]) for part in block] for block in blocks] == [
        [min(rows, 19 - start) for start in range(0, 19, rows)]
    ] * 2
