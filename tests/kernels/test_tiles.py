"""Instructions of every vector unit for every kind of sketch, compiled without numba.

Those of other processors than this one run in an emulator. There, an access beyond the end of an
array is an error.
"""

import functools
import re

import numpy as np
import pytest
import torch
import unicorn

from helpers.sketches import random, random_sketch
from helpers.unit_machine import LOOKED_UP, UNITS, Machine, assembly, outer_bodies, sketch_bodies
from spallm_kernels.cpu.vector_units import unit_of

BITS = [2, 3, 4]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SEED = 2**32 - 5
#: Columns and groups: whole steps, a last step, no whole step.
SHAPES = [(16, 1), (48, 3), (47, 1), (5, 1), (80, 2), (32, 4)]
#: With hashed codes, groups need not start at whole bytes.
HASHED_SHAPES = [(32, 1), (94, 2), (15, 3)]
ROWS = 5


def machine_for(unit, bits, kind, mappings):
    bodies = (sketch_bodies(unit, bits, kind, hashed) for hashed in mappings)
    return Machine(unit, functools.reduce(dict.__or__, bodies))


def bits_of(tensor):
    """Return the elements of a tensor as an array of integers."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()


def arguments_of(sketch, table, row):
    """Return the arguments of every function that computes with a sketch."""
    index_map, groups = sketch.index_map.numpy(), table.shape[1]
    width, seed = sketch.codes.shape[1] // groups, sketch.hash_seed or 0
    return index_map, index_map.shape[1], bits_of(table), groups, width, seed, row


def shapes_of(hashed):
    return [(*shape, SEED) for shape in HASHED_SHAPES] if hashed else [(*s, None) for s in SHAPES]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("unit", UNITS)
def test_products_of_every_tile(unit, bits, kind):
    dtype, described = DTYPES[kind], unit_of(unit)
    mappings = (0, 1) if kind == "float32" else (0,)
    machine = machine_for(unit, bits, kind, mappings)
    tiles = {*zip(described.rows, (1, 2, 4), strict=True), described.block, (1, 1)}
    for hashed in mappings:
        name = f"{bits}_{kind}_{hashed}"
        for columns, groups, seed in shapes_of(hashed):
            sketch = random_sketch(bits, groups, ROWS, columns, dtype=dtype, hash_seed=seed)
            table, width = sketch.table.to(dtype), columns // groups
            x = random(8, columns, dtype=torch.float32).float().numpy()
            products = x.astype(np.float64)[:, None] * sketch.dense().numpy()
            in_steps = np.arange(columns) % width < width - width % 16
            expected = products[..., in_steps].sum(-1)
            most = 1e-6 * np.abs(products.sum(-1)).max()
            for rows, tokens in tiles:
                y = np.full((tokens, ROWS), 1e9, np.float32)
                given = arguments_of(sketch, table, 1)
                machine.run(f"tile_{name}_{rows}_{tokens}", *given, x, y, 4 * ROWS)
                inside = slice(1, 1 + rows)
                assert np.abs(y[:, inside] - expected[:tokens, inside]).max() < most
                assert (np.delete(y, range(1, 1 + rows), axis=1) == 1e9).all()
            if width % 16:
                y = expected[0].astype(np.float32)
                for row in range(ROWS):
                    machine.run(f"rest_{name}", *arguments_of(sketch, table, row), x[0], y)
                assert np.abs(y - products[0].sum(-1)).max() < most


@pytest.mark.parametrize("kind", LOOKED_UP)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("unit", UNITS)
def test_lookups_copy_every_bit_of_an_entry(unit, bits, kind):
    mappings = (0, 1) if kind == "float32" else (0,)
    machine = machine_for(unit, bits, kind, mappings)
    generator = torch.Generator().manual_seed(bits)
    integers = torch.int32 if kind == "float32" else torch.int16
    limits = torch.iinfo(integers)
    for hashed in mappings:
        name = f"{bits}_{kind}_{hashed}"
        for columns, groups, seed in shapes_of(hashed):
            sketch = random_sketch(bits, groups, ROWS, columns, hash_seed=seed)
            shape, width = (ROWS, groups, 1 << bits), columns // groups
            table = torch.randint(
                limits.min, limits.max + 1, shape, generator=generator, dtype=integers
            )
            expected = sketch.dense(table).numpy().reshape(ROWS, groups, width)
            whole = width - width % 16
            for row in (0, ROWS - 1):
                for group in range(groups):
                    given = (*arguments_of(sketch, table, row), group)
                    steps, last = (np.zeros(n, table.numpy().dtype) for n in (whole, width % 16))
                    machine.run(f"steps_{name}", *given, 0, whole // 16, steps)
                    if last.size:
                        machine.run(f"last_{name}", *given, last)
                    found = np.concatenate([steps, last])
                    assert np.array_equal(found, expected[row, group])
            if whole > 16:
                behind = np.zeros(whole - 16, table.numpy().dtype)
                machine.run(f"steps_{name}", *given, 1, whole // 16 - 1, behind)
                assert np.array_equal(behind, expected[row, group, 16:whole])


@pytest.mark.parametrize("unit", UNITS)
def test_outer_products_of_both_tiles(unit):
    """Small integers, so sums are exact. The factors may lie in either order."""
    machine, (tall, vectors) = Machine(unit, outer_bodies(unit)), unit_of(unit).panel
    columns = vectors * unit_of(unit).lanes
    generator = np.random.default_rng(0)
    for steps in (0, 1, 7):
        panel, factors = (
            generator.integers(-9, 9, shape).astype(np.float32)
            for shape in ((steps, 64), (steps, tall))
        )
        for rows in (tall, 1):
            before = generator.integers(-9, 9, (rows, 64)).astype(np.float32)
            expected = before.copy()
            expected[:, :columns] += (factors[:, :rows].T @ panel)[:, :columns]
            by_step, by_row = before.copy(), before.copy()
            machine.run(f"outer_{rows}", factors, 4, 4 * tall, panel, by_step, steps)
            transposed = np.ascontiguousarray(factors.T)
            machine.run(f"outer_{rows}", transposed, 4 * steps, 4, panel, by_row, steps)
            assert np.array_equal(by_step, expected)
            assert np.array_equal(by_row, expected)


@pytest.mark.parametrize("bits", BITS)
def test_neon_looks_up_in_registers_and_multiplies_with_fused_additions(bits):
    """A table of 2^bits entries of 4 bytes is read from 2^bits / 4 registers."""
    text = assembly("neon", sketch_bodies("neon", bits, "float32", 0))
    registers = {found.count("v") for found in re.findall(r"\btbl\t\S+ \{ ([^}]*) \}", text)}
    assert registers == {(1 << bits) // 4}
    assert "\tfmla\t" in text
    assert "\tbl\t" not in text  # no calls


@pytest.mark.parametrize("short", [0, 1, 2])
def test_the_emulator_notices_an_access_beyond_the_end(short):
    machine = Machine("neon", outer_bodies("neon"))
    arrays = [np.ones(shape, np.float32) for shape in ((5, 1), (5, 64), (1, 16))]
    machine.run("outer_1", arrays[0], 4, 4, *arrays[1:], 5)
    arrays[short] = arrays[short].reshape(-1)[:-1].copy()
    if short == 1:  # the tile has the first 16 of 64 columns
        arrays[1] = arrays[1][: 4 * 64 + 15].copy()
    with pytest.raises(unicorn.UcError, match="UC_ERR_READ_UNMAPPED"):
        machine.run("outer_1", arrays[0], 4, 4, *arrays[1:], 5)
