"""Instructions for tokens with tables of their own, for every vector unit, without numba."""

import numpy as np
import pytest
import torch

from helpers.sketches import random, random_sketch
from helpers.unit_machine import MIXED, UNITS, Machine, mixed_bodies, sketch_bodies
from spallm_kernels.cpu.vector_units import unit_of

#: The dtype that tables are read in, and the one that entries are rounded to.
KINDS = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "rounded_float16": (torch.float32, torch.float16),
    "rounded_bfloat16": (torch.float32, torch.bfloat16),
}
TOKENS, ROWS, SEED = 4, 6, 2**32 - 5
#: Columns and groups.
SHAPES = [(16, 1), (96, 2), (96, 3)]


def tables_of(bits, groups, dtype, target):
    """Return tables for each token; half of their entries lie between two values of `target`."""
    generator = torch.Generator().manual_seed(bits)
    size = (TOKENS, ROWS, groups, 1 << bits)
    values = torch.randn(size, generator=generator, dtype=torch.float64).to(target)
    above = torch.nextafter(values, torch.full_like(values, torch.inf))
    between = (values.double() + above.double()) / 2
    chosen = torch.rand(size, generator=generator) < 0.5
    return torch.where(chosen, between, values.double()).to(dtype)


def run(machine, shape, sketch, tables, x):
    """Return the products of the rows from 1 on, and assert that no others are written."""
    (rows, tokens), (_, all_rows, groups, _) = shape, tables.shape
    integers = tables.view({2: torch.int16, 4: torch.int32}[tables.element_size()]).numpy()
    y = np.full((tokens, all_rows), 1e9, np.float32)
    index_map = sketch.index_map.numpy()
    machine.run(
        f"mixed_{rows}_{tokens}",
        *(index_map, index_map.shape[1], integers, groups, sketch.codes.shape[1] // groups),
        *(sketch.hash_seed or 0, 1, x, y, 4 * all_rows, integers[0].nbytes),
    )
    assert (np.delete(y, range(1, 1 + rows), axis=1) == 1e9).all()
    return y[:, 1 : 1 + rows]


@pytest.mark.parametrize(
    ("bits", "kind"), [(2, "float32"), (3, "float32"), *((4, kind) for kind in KINDS)]
)
@pytest.mark.parametrize("unit", UNITS)
def test_products_of_every_tile(unit, bits, kind):
    dtype, target = KINDS[kind]
    for hashed in (0, 1) if kind == "float32" else (0,):
        machine = Machine(unit, mixed_bodies(unit, bits, kind, hashed))
        for columns, groups in SHAPES:
            sketch = random_sketch(bits, groups, ROWS, columns, hash_seed=SEED if hashed else None)
            tables = tables_of(bits, groups, dtype, target)
            x = random(TOKENS, columns, dtype=torch.float32).float().numpy()
            dense = np.stack([sketch.dense(own.to(target).double()).numpy() for own in tables])
            products = x.astype(np.float64)[:, None] * dense
            expected = products.sum(-1)
            for shape in MIXED:
                found = run(machine, shape, sketch, tables, x)
                wanted = expected[: shape[1], 1 : 1 + shape[0]]
                assert np.abs(found - wanted).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["rounded_float16", "rounded_bfloat16"])
@pytest.mark.parametrize("unit", UNITS)
def test_entries_are_rounded_as_torch_rounds_them(unit, kind):
    """Inputs with a single one take an entry as it is. NaN stays NaN, whatever its bits."""
    dtype, target = KINDS[kind]
    machine = Machine(unit, mixed_bodies(unit, 4, kind, 0))
    sketch = random_sketch(4, 1, ROWS, 16)
    tables = tables_of(4, 1, dtype, target)
    assert (tables != tables.to(target).float()).any()
    dense = torch.stack([sketch.dense(own.to(target).float()) for own in tables])
    for column in range(16):
        x = np.zeros((TOKENS, 16), np.float32)
        x[:, column] = 1
        assert np.array_equal(run(machine, (2, 4), sketch, tables, x), dense[:, 1:3, column])
    nan = torch.full(tables.shape, 2**31 - 1, dtype=torch.int32).view(torch.float32)
    assert np.isnan(run(machine, (2, 4), sketch, nan, x)).all()


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("unit", UNITS)
def test_a_token_has_the_bits_of_a_layer(unit, bits):
    layer = sketch_bodies(unit, bits, "float32", 0)
    machine = Machine(unit, layer | mixed_bodies(unit, bits, "float32", 0))
    rows = unit_of(unit).rows[0]
    for columns, groups in SHAPES:
        sketch = random_sketch(bits, groups, ROWS, columns)
        tables = tables_of(bits, groups, torch.float32, torch.float32)
        x = random(TOKENS, columns, dtype=torch.float32).float().numpy()
        for shape in MIXED:
            found = run(machine, shape, sketch, tables, x)
            for token in range(shape[1]):
                y = np.zeros((1, ROWS), np.float32)
                machine.run(
                    f"tile_{bits}_float32_0_{rows}_1",
                    *(sketch.index_map.numpy(), sketch.index_map.shape[1], tables[token].numpy()),
                    *(groups, columns // groups, 0, 1, x[token], y, 0),
                )
                wanted = y[0, 1 : 1 + min(rows, shape[0])]
                assert np.array_equal(found[token, : len(wanted)], wanted)
