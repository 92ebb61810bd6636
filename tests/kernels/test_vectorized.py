"""Products and lookups in vector registers, on every vector unit of this machine.

Numba takes a second for a kernel. So each test has the kinds of sketches that it needs only, and
`test_tiles.py` has all of them.
"""

import numba
import pytest
import torch

from helpers.sketches import random, random_sketch
from spallm_formats import pack
from spallm_kernels.cpu import vectorized
from spallm_kernels.cpu.vector_units import available_units
from spallm_kernels.reference import linear as reference

BITS = [2, 3, 4]
SEED = 2**32 - 5
#: Every number of bits, dtype of tables and mapping: bits, dtype, seed.
KINDS = [
    (4, torch.float32, None),
    (3, torch.float16, None),
    (2, torch.bfloat16, None),
    (4, torch.bfloat16, SEED),
    (3, torch.float32, SEED),
    (2, torch.float16, SEED),
]
TOKENS = [*range(10), 17, 40]
#: Columns and groups: whole steps, a last step, no whole step.
SHAPES = [(16, 1), (272, 1), (96, 4), (47, 1), (5, 1), (1, 1), (32, 4), (120, 5)]
#: With hashed codes, groups need not start at whole bytes.
HASHED_SHAPES = [(94, 2), (21, 3)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
#: Bits of entries that arithmetic could change: infinities, NaN quiet and signalling, the smallest
#: and the largest denormal, both zeros.
SPECIAL = {
    torch.float32: (0x7F800000, 0x7FC00001, 0x7F800001, 1, 0x007FFFFF, 0, -0x80000000, -0x800000),
    torch.float16: (0x7C00, 0x7E01, 0x7C01, 1, 0x03FF, 0, -0x8000, -0x400),
    torch.bfloat16: (0x7F80, 0x7FC1, 0x7F81, 1, 0x007F, 0, -0x8000, -0x80),
}


def inputs(*shape, seed=0):
    return random(*shape, dtype=torch.float32, seed=seed).float()


def decode(sketch, x, table=None):
    table = sketch.table.float() if table is None else table
    assert vectorized.supports(table, x.shape[1], sketch.hash_seed)
    return vectorized.decode(x, sketch.index_map, table, sketch.hash_seed)


@pytest.mark.parametrize(("bits", "dtype", "seed"), KINDS)
def test_products_equal_those_in_float64(unit, bits, dtype, seed):
    for columns, groups in [*SHAPES, *(HASHED_SHAPES if seed else [])]:
        x = inputs(max(TOKENS), columns)
        for rows in (1, 6, 19):
            sketch = random_sketch(bits, groups, rows, columns, dtype=dtype, hash_seed=seed)
            expected = x.double() @ sketch.dense().T
            for tokens in TOKENS:
                y = decode(sketch, x[:tokens], sketch.table.to(dtype))
                assert y.dtype == torch.float32
                assert y.shape == (tokens, rows)
                errors = (y.double() - expected[:tokens]).abs()
                assert (errors < 1e-6 * expected.abs().max()).all()


def test_products_have_the_same_bits_on_any_number_of_threads(unit, monkeypatch):
    sketch, x = random_sketch(4, 2, 133, 544), inputs(7, 544)
    expected = decode(sketch, x)
    assert torch.equal(decode(sketch, x), expected)
    monkeypatch.setattr(vectorized, "SERIAL", 0)
    before = numba.get_num_threads()
    try:
        for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
            numba.set_num_threads(threads)
            for _ in range(3):
                assert torch.equal(decode(sketch, x), expected)
    finally:
        numba.set_num_threads(before)


def test_a_product_depends_on_no_other_row_and_no_other_token(unit):
    sketch, x = random_sketch(4, 1, 23, 47), inputs(7, 47)
    table, expected = sketch.table.float(), decode(sketch, x)
    for row in (0, 3, 15, 16, 22):
        alone = vectorized.decode(x, sketch.index_map[[row]], table[[row]], None)
        assert torch.equal(alone[:, 0], expected[:, row])
        poisoned = torch.full_like(table, torch.nan)
        poisoned[row] = table[row]
        assert torch.equal(decode(sketch, x, poisoned)[:, row], expected[:, row])
    for token in range(7):
        others = torch.full_like(x, torch.inf)
        others[token] = x[token]
        assert torch.equal(decode(sketch, others)[token], expected[token])
        assert torch.equal(decode(sketch, x[[token]])[0], expected[token])


@pytest.mark.parametrize("columns", [16, 47, 5])
def test_entries_that_no_weight_uses_do_not_matter(unit, columns):
    """Nor do bits behind the last code, or bytes behind the last one."""
    bytes_needed = pack(torch.zeros(1, columns, dtype=torch.uint8).numpy(), 4).shape[1]
    index_map = torch.full((5, bytes_needed + 3), 255, dtype=torch.uint8)
    index_map[:, : columns // 2] = 0x11
    if columns % 2:
        index_map[:, columns // 2] = 0xF1
    table = torch.full((5, 1, 16), torch.nan)
    table[:, 0, 1] = torch.arange(1.0, 6.0)
    x = torch.arange(1.0, 1.0 + columns).repeat(3, 1)
    y = vectorized.decode(x, index_map, table, None)
    assert torch.equal(y, table[:, 0, 1] * x.sum(1, keepdim=True))
    weight = vectorized.dequantize(index_map, table, columns, None, 0)
    assert torch.equal(weight, table[:, 0, 1:2].expand(5, columns))


def test_tensors_may_be_views(unit):
    sketch, x = random_sketch(4, 2, 12, 32), inputs(32, 10)
    wide = torch.full((12, 2, 32), torch.nan)
    wide[..., ::2] = sketch.table.float()
    index_map = sketch.index_map.repeat_interleave(2, 0)[::2]
    y = vectorized.decode(x.T[::2], index_map, wide[..., ::2], None)
    assert torch.equal(y, decode(sketch, x.T[::2].contiguous()))
    weight = vectorized.dequantize(index_map, wide[..., ::2], 32, None, 0)
    assert torch.equal(weight, sketch.dense(sketch.table.float()))


@pytest.mark.parametrize("bits", BITS)
def test_a_million_lookups_copy_every_bit(unit, bits):
    """Entries are random bits, so any value occurs: infinities, NaN and denormals too."""
    rows, columns, generator = 1003, 1040, torch.Generator().manual_seed(bits)
    index_map = torch.randint(
        0, 256, (rows, columns * bits // 8), generator=generator, dtype=torch.uint8
    )
    for dtype in DTYPES:
        integers, special = INTEGERS[dtype], torch.tensor(SPECIAL[dtype])
        limits = torch.iinfo(integers)
        shape = (rows, 5, 1 << bits)
        table = torch.randint(
            limits.min, limits.max + 1, shape, generator=generator, dtype=integers
        )
        table[::2, ..., : len(special)] = special[: 1 << bits].to(integers)
        expected = reference.dequantize(index_map, table, columns)
        found = vectorized.dequantize(index_map, table.view(dtype), columns, None, 0)
        assert found.dtype == dtype
        assert torch.equal(found.view(integers), expected)


@pytest.mark.parametrize("columns", [5, 47, 96])
@pytest.mark.parametrize("seed", [None, SEED])
def test_lookups_may_start_at_any_row(unit, seed, columns):
    sketch = random_sketch(4, 1, 40, columns, hash_seed=seed)
    table = sketch.table.float()
    expected = reference.dequantize(sketch.index_map, table, columns, hash_seed=seed)
    assert torch.equal(expected, sketch.dense(table))
    for first in (0, 1, 7, 39):
        some = sketch.index_map[first:], table[first:]
        found = vectorized.dequantize(*some, columns, seed, first)
        assert torch.equal(found, expected[first:])


@pytest.mark.parametrize("name", list(available_units())[:1])
def test_serial_and_parallel_code_are_apart_in_numbas_cache(name, monkeypatch, tmp_path):
    """They differ in an option only, which the cache ignores."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    make = vectorized._look_up.__wrapped__
    arguments = (0, 0, 0, 1, 16, 0, 0, 0, 0, 64)  # no rows
    for parallel in (False, True):
        first, second = (make(name, 4, "float32", 0, parallel) for _ in range(2))
        first(*arguments)
        second(*arguments)
        assert not first.stats.cache_hits
        assert second.stats.cache_hits
