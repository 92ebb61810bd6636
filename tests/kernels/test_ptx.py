"""The lookup's assembly, run in NumPy: every code in every place, every bit of an entry."""

import itertools

import numpy as np
import pytest
import torch

from helpers import ptx_model
from spallm_formats import pack
from spallm_kernels.triton import ptx

BITS = [2, 3, 4]


def split_tables(tables, bits):
    """Byte registers of tables, uint16 [tables, 2^bits], by the assembly under test."""
    order = [int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits)]
    assembly, constraints = ptx.split_table(bits)
    assert constraints.count("h") == len(order)
    inputs = [tables[:, entry] for entry in order]
    return ptx_model.run(assembly, ptx.byte_registers(bits), inputs)


def look_up(codes, tables, bits):
    """Weights, uint16 [units, codes of a unit], of one unit per table."""
    words = pack(codes, bits)[:, : 4 * ptx.UNIT_WORDS[bits]].view("<u4")
    assembly, constraints = ptx.look_up(bits)
    inputs = [*words.T, *split_tables(tables, bits)]
    assert constraints.count("r") == len(inputs)
    return np.stack(ptx_model.run(assembly, ptx.UNIT_CODES[bits], inputs), axis=1)


@pytest.mark.parametrize("bits", BITS)
def test_every_pair_of_codes_in_every_pair_of_neighbouring_places(bits):
    """Neighbours share words, bytes and selectors; random codes elsewhere would show a leak."""
    generator = np.random.default_rng(0)
    width = ptx.UNIT_CODES[bits]
    pairs = list(itertools.product(range(1 << bits), repeat=2))
    codes = generator.integers(0, 1 << bits, (width, len(pairs), width), dtype=np.uint8)
    for place in range(width):
        codes[place, :, place], codes[place, :, (place + 1) % width] = np.transpose(pairs)
    codes = codes.reshape(-1, width)
    tables = generator.integers(0, 1 << 16, (len(codes), 1 << bits), dtype=np.uint16)
    expected = np.take_along_axis(tables, codes, axis=1)
    assert np.array_equal(look_up(codes, tables, bits), expected)


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_of_every_entry_is_carried(bits):
    """All bits set, signs included: a byte permute in its sign mode would show."""
    entries = 1 << bits
    for entry, bit in itertools.product(range(entries), range(16)):
        tables = np.zeros((entries, entries), np.uint16)
        tables[:, entry] = 1 << bit
        codes = np.repeat(np.arange(entries, dtype=np.uint8)[:, None], ptx.UNIT_CODES[bits], axis=1)
        expected = np.where(codes == entry, np.uint16(1 << bit), np.uint16(0))
        assert np.array_equal(look_up(codes, tables, bits), expected)


@pytest.mark.parametrize("bits", BITS)
def test_marks_of_every_entry_in_every_place(bits):
    """Random codes; each entry is compared with all of them."""
    codes = np.random.default_rng(0).integers(
        0, 1 << bits, (300, ptx.UNIT_CODES[bits]), dtype=np.uint8
    )
    words = pack(codes, bits)[:, : 4 * ptx.UNIT_WORDS[bits]].view("<u4")
    assembly, constraints = ptx.one_hot(bits)
    assert constraints.count("r") == words.shape[1] + 1
    for entry in range(1 << bits):
        field = np.uint32(entry * (0x55555555 if bits == 2 else 0x11111111))
        inputs = [*words.T, np.full(len(words), field)]
        found = np.stack(ptx_model.run(assembly, ptx.UNIT_CODES[bits], inputs), axis=1)
        assert np.array_equal(found, np.where(codes == entry, 0x4040, 0))


def test_a_mark_is_a_number_that_both_formats_hold():
    bits = torch.tensor([0x4040], dtype=torch.int16)
    assert bits.view(torch.bfloat16).item() == ptx.BFLOAT16_MARK
    assert bits.view(torch.float16).item() == ptx.FLOAT16_MARK


@pytest.mark.parametrize("bits", BITS)
def test_the_model_sees_a_wrong_instruction(bits):
    """One digit of one mask changed: the comparison above fails, so it can fail."""
    assembly, _ = ptx.look_up(bits)
    wrong = assembly.replace({2: "0x5140", 3: "0x0f0f0f0f", 4: "0x32103210"}[bits], "0x12345678", 1)
    assert wrong != assembly
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 1 << bits, (64, ptx.UNIT_CODES[bits]), dtype=np.uint8)
    tables = generator.integers(0, 1 << 16, (64, 1 << bits), dtype=np.uint16)
    words = pack(codes, bits)[:, : 4 * ptx.UNIT_WORDS[bits]].view("<u4")
    found = ptx_model.run(wrong, ptx.UNIT_CODES[bits], [*words.T, *split_tables(tables, bits)])
    assert not np.array_equal(np.stack(found, axis=1), np.take_along_axis(tables, codes, axis=1))
