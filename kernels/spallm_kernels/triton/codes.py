"""Produce the codes of an index map inside a kernel: read from memory, or hashed.

Index maps are treated as 32-bit words, `row_words` per row. Word i of a row holds bits [32 i, 32 i
+ 32) of its bit stream, least significant first.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """Map 32-bit integers one to one (see `reference/hashing.py`)."""
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def row_keys(rows, first_row, seed):
    """Return the hash keys of rows, counted from row `first_row` of the module."""
    return mix((rows + first_row).to(tl.uint32) ^ mix(seed.to(tl.uint32)))


@triton.jit
def stored_codes(words, columns, mask, BITS: tl.constexpr):
    """Read the codes at any columns. words: pointers to the first word of each row."""
    bit = columns * BITS
    word, shift = bit // 32, bit % 32
    code = tl.load(words + word, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS:  # a code may end in the next word
        crosses = mask & (shift + BITS > 32)
        rest = tl.load(words + word + 1, mask=crosses, other=0).to(tl.uint32, bitcast=True)
        code = tl.where(crosses, code | (rest << ((32 - shift) & 31)), code)
    return (code & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def hashed_codes(keys, columns, BITS: tl.constexpr):
    """Compute the codes of the `hash` mapping at any columns. keys: `row_keys` of each row."""
    return (mix(columns.to(tl.uint32) ^ keys) & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def stored_unit(words, mask, WORDS: tl.constexpr):
    """Read the words of units, a tuple of WORDS tensors.

    words: pointers to the first word of each unit.

    If WORDS is a multiple of four, words are read 16 bytes at a time.
    """
    unit = ()
    if WORDS % 4 == 0:
        four = tl.arange(0, 4)[None, None, None, :]
        if mask is not None:
            mask = tl.expand_dims(mask, 3)
        for number in tl.static_range(WORDS // 4):
            at = tl.expand_dims(words, 3) + (4 * number + four)
            quad = tl.load(at, mask=mask, other=None if mask is None else 0)
            quad = quad.to(tl.uint32, bitcast=True)
            even, odd = tl.split(quad.reshape(quad.shape[:3] + (2, 2)))
            first, third = tl.split(even)
            second, fourth = tl.split(odd)
            unit = unit + (first, second, third, fourth)
    else:
        for number in tl.static_range(WORDS):
            word = tl.load(words + number, mask=mask, other=None if mask is None else 0)
            unit = unit + (word.to(tl.uint32, bitcast=True),)
    return unit


@triton.jit
def hashed_unit(keys, units, BITS: tl.constexpr, CODES: tl.constexpr, WORDS: tl.constexpr):
    """Compute the words that units of the `hash` mapping would have if they were stored."""
    unit = ()
    for number in tl.static_range(WORDS):
        word = tl.zeros_like(keys + units.to(tl.uint32))
        for code in tl.static_range(CODES):
            if 32 * number - BITS < code * BITS and code * BITS < 32 * number + 32:
                found = hashed_codes(keys, units * CODES + code, BITS).to(tl.uint32)
                word = word | _shifted(found, code * BITS - 32 * number)
        unit = unit + (word,)
    return unit


@triton.jit
def unit_code(unit, CODE: tl.constexpr, BITS: tl.constexpr):
    """Return one code of each unit, int32."""
    WORD: tl.constexpr = CODE * BITS // 32
    SHIFT: tl.constexpr = CODE * BITS % 32
    code = unit[WORD] >> SHIFT
    if SHIFT + BITS > 32:
        code = code | _shifted(unit[WORD + 1], 32 - SHIFT)
    return (code & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _shifted(word, PLACES: tl.constexpr):
    """Shift left, or right if PLACES is negative."""
    return word << PLACES if PLACES >= 0 else word >> -PLACES
