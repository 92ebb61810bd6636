"""Sum the gradient of the dense weight per code, row and group: the gradient of the tables."""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import hashed_codes, row_keys, stored_codes


@triton.jit(do_not_specialize=["first_row", "seed"])
def table_grad_kernel(
    words,
    weight_grad,
    sums,
    rows,
    columns,
    row_words,
    width,
    first_row,
    seed,
    BITS: tl.constexpr,
    HASHED: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum ROWS rows of one group per program, all codes at once, in registers.

    Every thread keeps its own 2^BITS partial sums. They are added once, at the end, in a fixed
    order.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    code = tl.arange(0, 2**BITS)
    line = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
    keys = row_keys(line, first_row, seed)
    partial = tl.zeros((2**BITS, ROWS, COLUMNS), WIDE)
    for done in range(0, width, COLUMNS):
        offset = done + tl.arange(0, COLUMNS)[None, :]
        inside = offset < width
        column = group * width + offset
        if HASHED:
            found = hashed_codes(keys, column, BITS)
        else:
            found = stored_codes(words + line * row_words, column, inside, BITS)
        value = tl.load(weight_grad + line * columns + column, mask=inside, other=0.0).to(WIDE)
        chosen = found[None, :, :] == code[:, None, None]
        partial = tl.where(chosen, partial + value[None, :, :], partial)
    at = (line * (columns // width) + group) * 2**BITS + code[None, :]
    tl.store(sums + at, tl.sum(partial, axis=2).permute(1, 0), mask=(row < rows)[:, None])
