"""Packing: the fast functions match the bit-by-bit reference, at every width."""

import numpy as np
import pytest

from spallm_formats import pack, pack_reference, row_bytes, unpack, unpack_reference
from spallm_formats.packing import padding_is_zero


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 16, 127, 128, 129, 576])
def test_fast_and_reference_agree(bits, columns):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (5, columns)).astype(np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (5, row_bytes(columns, bits))
    assert packed.shape[1] % 16 == 0
    np.testing.assert_array_equal(packed, pack_reference(codes, bits))
    np.testing.assert_array_equal(unpack(packed, bits, columns), codes)
    np.testing.assert_array_equal(unpack_reference(packed, bits, columns), codes)
    assert padding_is_zero(packed, bits, columns)


def test_the_sentence_in_the_specification():
    codes = np.random.default_rng(0).integers(0, 8, (1, 50)).astype(np.uint8)
    row, n, bits = pack(codes, 3)[0], 50, 3
    decoded = np.packbits(
        np.unpackbits(row, count=n * bits, bitorder="little").reshape(n, bits),
        axis=1,
        bitorder="little",
    )[:, 0]
    np.testing.assert_array_equal(decoded, codes[0])


@pytest.mark.parametrize("bits", range(1, 9))
def test_any_set_padding_bit_is_found(bits):
    columns = 13
    packed = pack(np.zeros((2, columns), np.uint8), bits)
    for bit in range(columns * bits, packed.shape[1] * 8):
        spoiled = packed.copy()
        spoiled[1, bit // 8] |= 1 << (bit % 8)
        assert not padding_is_zero(spoiled, bits, columns)


def test_rows_need_no_columns():
    assert pack(np.empty((3, 0), np.uint8), 4).shape == (3, 0)


def test_unusable_input_is_refused():
    codes = np.full((2, 8), 4, np.uint8)
    with pytest.raises(ValueError, match="below 4 at 2 bits, found 4"):
        pack(codes, 2)
    with pytest.raises(ValueError, match="1 to 8, found 9"):
        pack(codes, 9)
    with pytest.raises(ValueError, match="must be uint8"):
        pack(codes.astype(np.int64), 4)
    with pytest.raises(ValueError, match=r"\[rows, 16\]"):
        unpack(np.zeros((2, 8), np.uint8), 4, 8)
