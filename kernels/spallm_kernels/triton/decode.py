"""Compute the product for few tokens: look weights up in registers on the way to the tensor cores.

Only packed codes and tables are read. A program computes ROWS outputs. Each of its SLOTS warps
takes an equal share of the columns, so a warp needs only a tile of codes and a tile of x. The
shares are added once, at the end: one launch, no atomics, the same bits every time.

Columns enter the dot product in an order that we choose. An `mma` gives thread t of four the
columns K_PER_LANE t, K_PER_LANE t + 1, ... of every 4 K_PER_LANE columns. The tiles are permuted so
that these columns are the codes of one unit, and the weights that a thread looks up stay in its
registers.

The same kernel serves the experts of a mixture. A program then takes a block of tokens of one
expert (see `expert_blocks.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import hashed_unit, row_keys, stored_unit
from .expert_blocks import to_expert
from .lookup import look_up, prepare, stack
from .set_blocks import line_of, to_set


@triton.jit(do_not_specialize=["seed"])
def decode_kernel(
    x,
    words,
    table,
    tables,  # of the sets behind the first one
    bias,
    y,
    offsets,
    order,  # of tokens, by set
    tokens,
    rows,  # of an expert, if there are experts
    columns,
    row_words,
    width,  # columns of a group
    span,  # consecutive columns of a warp that share a table
    seed,
    BITS: tl.constexpr,
    CODES: tl.constexpr,  # of a unit
    WORDS: tl.constexpr,  # of a unit
    HASHED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXPERTS: tl.constexpr,  # 0 if there is one weight for all tokens
    SETS: tl.constexpr,  # EXPERTS counts sets of tables, which share their codes
    PADDED: tl.constexpr,  # a power of two above EXPERTS
    EVEN: tl.constexpr,  # span is a whole number of steps
    WORD_ALIGN: tl.constexpr,  # divides the first word of every warp in a row
    ASM: tl.constexpr,
    DTYPE: tl.constexpr,
    K_PER_LANE: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,  # per row, in one step of a warp
    TOKENS: tl.constexpr,
    ONE: tl.constexpr,  # there is one token, which is copied TOKENS times
    STAGES: tl.constexpr,
):
    STEP: tl.constexpr = UNITS * CODES
    first_row = 0
    SIZE: tl.constexpr = 1 if ONE else TOKENS
    if SETS:
        table, first, tokens = to_set(
            table, tables, offsets, tokens, rows * (columns // width) * 2**BITS, EXPERTS, PADDED,
            SIZE
        )  # fmt: skip
        order += first
    elif EXPERTS:
        x, words, table, y, first_row, tokens = to_expert(
            x, words, table, y, offsets, tokens, rows, columns, row_words, columns // width,
            EXPERTS, PADDED, SIZE, TOKENS, ROWS, 2**BITS, WORD_ALIGN
        )  # fmt: skip
    if EXPERTS:
        if tokens <= 0:
            return
    row = tl.program_id(1 if SETS else 0) * ROWS + tl.arange(0, ROWS)
    # Beyond the end, the last row is read again and not stored.
    safe_row = tl.minimum(row, rows - 1)
    token = tl.arange(0, TOKENS)
    read_token = tl.arange(0, 1 if ONE else TOKENS)[None, :, None]
    # Reading one token in the place of missing ones keeps a cache line busy: two tokens would take
    # longer than eight. With many tokens few are missing, and masks would cost registers.
    MASKED: tl.constexpr = not ONE and TOKENS <= 16
    if not MASKED:
        read_token = tl.minimum(read_token, tokens - 1)
    line = line_of(order, read_token, tokens, SETS)
    unit = tl.arange(0, UNITS)[None, None, :]
    column = tl.arange(0, STEP)[None, None, :]
    slot = tl.arange(0, SLOTS)
    groups = columns // width
    total = tl.zeros((SLOTS, ROWS, TOKENS), tl.float32)
    for part in range(columns // SLOTS // span):
        # The division hides the alignment from the compiler; without it, loads are 4 bytes wide.
        start = tl.multiple_of(slot * (columns // SLOTS) + part * span, 32)
        start_word = tl.multiple_of(start // CODES * WORDS, WORD_ALIGN)[:, None, None]
        at = (safe_row[None, :] * groups + (start // width)[:, None]) * 2**BITS
        entries = tl.load(table + at[:, :, None] + tl.arange(0, 2**BITS)[None, None, :])
        prepared = prepare(entries.to(DTYPE), BITS, ASM)
        start = start[:, None, None]
        row_word = tl.multiple_of(safe_row * row_words, WORD_ALIGN)[None, :, None]
        keys = row_keys(safe_row, first_row, seed)[None, :, None]
        for step in tl.range(tl.cdiv(span, STEP), num_stages=STAGES):
            # Addresses are computed again in every step: advancing tiles of pointers, or keeping
            # tiles of offsets, takes twice the registers.
            done = step * STEP
            if HASHED:
                units = (start + done) // CODES + unit
                packed = hashed_unit(keys, units, BITS, CODES, WORDS)
            else:
                inside = None if EVEN else done + unit * CODES < span
                word = start_word + (step * UNITS + unit) * WORDS
                packed = stored_unit(words + row_word + word, inside, WORDS)
            inside = None if EVEN else done + column < span
            if MASKED:
                there = read_token < tokens
                inside = there if EVEN else there & inside
            x_at = x + line * columns + (start + done + column)
            values = tl.load(x_at, mask=inside, other=None if inside is None else 0.0).to(DTYPE)
            if ONE:
                values = tl.broadcast_to(values, (SLOTS, TOKENS, STEP))
            weights = stack(look_up(packed, prepared, DTYPE, BITS, ASM))
            weights = _by_lane(weights, SLOTS, ROWS, UNITS, CODES, K_PER_LANE)
            values = _by_lane(values, SLOTS, TOKENS, UNITS, CODES, K_PER_LANE)
            total = tl.dot(weights, values.permute(0, 2, 1), total, input_precision="ieee")
    result = tl.sum(total, axis=0)
    if HAS_BIAS:
        result += tl.load(bias + safe_row).to(tl.float32)[:, None]
    tl.store(
        y + line_of(order, token, tokens, SETS)[None, :] * rows + row[:, None],
        result.to(y.dtype.element_ty),
        mask=(token < tokens)[None, :] & (row < rows)[:, None],
    )


@triton.jit
def _by_lane(
    tensor,
    SLOTS: tl.constexpr,
    LINES: tl.constexpr,
    UNITS: tl.constexpr,
    CODES: tl.constexpr,
    K_PER_LANE: tl.constexpr,
):
    """Reorder columns of [SLOTS, LINES, ...]: four units side by side, K_PER_LANE codes each."""
    split = tensor.reshape(SLOTS, LINES, UNITS // 4, 4, CODES // K_PER_LANE, K_PER_LANE)
    return split.permute(0, 1, 2, 4, 3, 5).reshape(SLOTS, LINES, UNITS * CODES)
