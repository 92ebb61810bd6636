"""Inputs and results of 16 bits have the bits that torch's conversions give, in every product."""

import numba
import pytest
import torch

from helpers.experts import random_experts
from helpers.sketches import random, random_sketch
from spallm_kernels import lut_experts
from spallm_kernels.cpu import experts, rows, vectorized
from spallm_kernels.cpu.conversions import add_bias, narrow, widen

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
#: Bits of float32 numbers at the limits: NaN quiet and with low bits only, infinities, zeros, the
#: largest number, the largest bfloat16 and one that rounds beyond it, ties in both dtypes,
#: denormals.
SPECIAL = [
    0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0x7F800000, -0x800000, 0, -0x80000000, 0x7F7FFFFF,
    0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x3F808000, 0x3F818000, 0x3F801000, 0x3F803000, 0x477FF000,
    0x477FEFFF, 1, 0x8000, 0x8001, 0x33000000, 0x33000001, 0x38800000,
]  # fmt: skip


def compiled(kind):
    """Return functions that widen, add and narrow elements of a kind."""

    @numba.njit
    def to_float(source, target, count):
        widen(source, target, count, kind)

    @numba.njit
    def add(sums, bias, count):
        add_bias(sums, bias, count, kind)

    @numba.njit
    def from_float(source, target, count):
        narrow(source, target, count, kind)

    return to_float, add, from_float


def same_bits(found, expected):
    """Return whether elements are the same, with a NaN of any bits where there is one."""
    integers = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    alike = found.view(integers) == expected.view(integers)
    return bool((alike | (found.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("kind", HALVES)
def test_elements_are_converted_as_torch_converts_them(kind):
    """Of all numbers of 16 bits, and of many of 32 bits. Not all fill vectors of 16."""
    dtype = HALVES[kind]
    to_float, add, from_float = compiled(kind)
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)[:-1]
    wide = torch.zeros(halves.numel() + 1)
    to_float(halves.data_ptr(), wide.data_ptr(), halves.numel())
    assert same_bits(wide[:-1], halves.float())
    assert wide[-1] == 0
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(1 << 31), 1 << 31, (halves.numel(),), generator=generator)
    drawn[: len(SPECIAL)] = torch.tensor(SPECIAL)
    floats = drawn.to(torch.int32).view(torch.float32)
    small = torch.zeros(halves.numel() + 1, dtype=dtype)
    from_float(floats.data_ptr(), small.data_ptr(), floats.numel())
    assert same_bits(small[:-1], floats.to(dtype))
    assert small[-1] == 0
    sums = floats.clone()
    add(sums.data_ptr(), halves.data_ptr(), sums.numel() - 3)
    expected = floats.clone()
    expected[:-3] += halves[:-3]
    assert same_bits(sums, expected)


@pytest.mark.parametrize("table", ["float32", "16 bits"])
@pytest.mark.parametrize("kind", HALVES)
def test_products_have_the_bits_of_those_in_float32(unit, kind, table, monkeypatch):
    """The last shape has more inputs than a thread widens alone."""
    monkeypatch.setattr(vectorized, "SERIAL", 1 << 60)  # half as many kernels to compile
    dtype, rounding = HALVES[kind], 0
    for columns, groups, tokens in [(272, 1, 11), (47, 1, 3), (96, 2, 1), (1040, 1, 40)]:
        sketch = random_sketch(4, groups, 19, columns)
        own = sketch.table.float() if table == "float32" else sketch.table.to(dtype)
        x = random(tokens, columns, dtype=dtype).to(dtype)
        for bias in (None, random(19, dtype=dtype).to(dtype)):
            sums = vectorized.decode(x.float(), sketch.index_map, own.to(dtype).float(), None)
            sums = sums if bias is None else sums + bias
            y = vectorized.decode(x, sketch.index_map, own, None, bias)
            assert y.dtype == dtype
            assert torch.equal(y, sums.to(dtype))
            rounding += int((sums != sums.to(dtype)).sum())
    assert rounding > 1000


@pytest.mark.parametrize("threads", [1, numba.config.NUMBA_NUM_THREADS])
@pytest.mark.parametrize("most", [0, rows.OWN_INPUTS])
def test_threads_may_share_inputs_or_widen_their_own(monkeypatch, most, threads):
    for module in (vectorized, experts):
        monkeypatch.setattr(module, "SERIAL", 0)
    monkeypatch.setattr(rows, "OWN_INPUTS", most)
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        sketch, x = random_experts(4, 1, [3, 0, 9], 70, 64), random(12, 64).bfloat16()
        _, copies = rows.widened(x, threads)
        assert copies == (threads if most else 1)
        table = sketch.table.bfloat16()
        y = lut_experts(x, sketch.offsets, sketch.index_map, table)
        wide = lut_experts(x.float(), sketch.offsets, sketch.index_map, table.float())
        assert torch.equal(y, wide.bfloat16())
        for expert, (start, end) in {0: (0, 3), 2: (3, 12)}.items():
            given = sketch.index_map[expert], table[expert]
            alone = vectorized.decode(x[start:end], *given, None)
            assert torch.equal(alone, y[start:end])
    finally:
        numba.set_num_threads(before)
