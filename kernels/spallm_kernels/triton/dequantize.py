"""Write the dense weight of a sketch once: for many tokens cuBLAS multiplies faster."""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import hashed_codes, hashed_unit, row_keys, stored_codes, stored_unit
from .lookup import look_up, prepare, stack


@triton.jit(do_not_specialize=["first_row", "seed"])
def dequantize_units_kernel(
    words,
    table,
    weight,
    rows,
    columns,
    row_words,
    width,
    first_row,
    seed,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    WORDS: tl.constexpr,
    HASHED: tl.constexpr,
    ASM: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Write ROWS rows of one group per program, for 16-bit tables and groups of whole units."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe_row = tl.minimum(row, rows - 1).to(tl.int64)
    group = tl.program_id(1)
    entry = tl.arange(0, 2**BITS)
    at = (safe_row * (columns // width) + group) * 2**BITS
    prepared = prepare(tl.load(table + at[:, None] + entry[None, :]), BITS, ASM)
    keys = row_keys(safe_row, first_row, seed)[:, None]
    for done in range(0, width, UNITS * CODES):
        start = group * width + done
        units = (start // CODES + tl.arange(0, UNITS))[None, :]
        inside = units < (group + 1) * width // CODES
        if HASHED:
            packed = hashed_unit(keys, units, BITS, CODES, WORDS)
        else:
            row_start = words + (safe_row * row_words)[:, None]
            packed = stored_unit(row_start + units * WORDS, inside, WORDS)
        values = stack(look_up(packed, prepared, table.dtype.element_ty, BITS, ASM))
        column = start + tl.arange(0, UNITS * CODES)[None, :]
        tl.store(
            weight + (safe_row * columns)[:, None] + column,
            values.reshape(ROWS, UNITS * CODES),
            mask=(row < rows)[:, None] & (column < (group + 1) * width),
        )


@triton.jit(do_not_specialize=["first_row", "seed"])
def dequantize_any_kernel(
    words,
    table,
    weight,
    rows,
    columns,
    row_words,
    width,
    first_row,
    seed,
    BITS: tl.constexpr,
    HASHED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write one tile per program, for any table and any columns, with one table load per weight."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    row = row.to(tl.int64)
    if HASHED:
        codes = hashed_codes(row_keys(row, first_row, seed), column, BITS)
    else:
        codes = stored_codes(words + row * row_words, column, inside, BITS)
    at = (row * (columns // width) + column // width) * 2**BITS + codes
    tl.store(weight + row * columns + column, tl.load(table + at, mask=inside), mask=inside)
