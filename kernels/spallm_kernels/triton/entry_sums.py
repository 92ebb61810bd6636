"""Multiply few tokens with a sketched weight on a GPU, each with the tables of its own set.

A weight is a table entry, so the product of a token and a row is a sum over the entries e of its
tables, group by group:

    y[t, r] = sum_g sum_e  T_s(t)[r, g, e]  *  ( sum of x[t, i] over i in g whose code is e )

The inner sums do not depend on tables. They are products with a weight of zeros and ones, which the
tensor cores compute for all tokens at once, whatever sets they have: 2^bits times as many
operations as the product of one set, and no lookups. Tokens may come in any order. The sums are
float32, and entries are multiplied once per group.

Programs are those of `decode.py`, with a line of the product for each entry of each row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import hashed_unit, row_keys, stored_unit
from .device import on
from .launching import (
    HALVES,
    INTERPRETED,
    K_PER_LANE,
    OPTIONS,
    packed_words,
    register_limit,
    words_per_row,
)
from .lookup import by_lane, one_hot, stack
from .ptx import BFLOAT16_MARK, FLOAT16_MARK, UNIT_CODES, UNIT_WORDS
from .set_blocks import count_blocks
from .tiles import sums_tile, table_span

_MARKS = {torch.bfloat16: BFLOAT16_MARK, torch.float16: FLOAT16_MARK}


@triton.jit(do_not_specialize=["seed"])
def entry_sums_kernel(
    x,
    words,
    table,  # of the base
    tables,  # of the slots
    sets,
    bias,
    y,
    offsets,  # of the sorted tokens of each set
    most,  # blocks of one set each, which are computed elsewhere
    slots,
    tokens,
    rows,
    columns,
    row_words,
    width,  # columns of a group
    span,  # consecutive columns of a warp that share a table
    seed,
    mark,  # what `one_hot` writes where a code is the entry
    BITS: tl.constexpr,
    CODES: tl.constexpr,  # of a unit
    WORDS: tl.constexpr,  # of a unit
    HASHED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SETS: tl.constexpr,
    PADDED: tl.constexpr,  # a power of two above SETS
    SIZE: tl.constexpr,  # tokens of a block of one set
    EVEN: tl.constexpr,  # span is a whole number of steps
    WORD_ALIGN: tl.constexpr,  # divides the first word of every warp in a row
    ASM: tl.constexpr,
    DTYPE: tl.constexpr,
    K_PER_LANE: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,  # per row, in one step of a warp
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    STEP: tl.constexpr = UNITS * CODES
    ENTRIES: tl.constexpr = 2**BITS
    LINES: tl.constexpr = ROWS * ENTRIES
    if count_blocks(offsets, SETS, PADDED, SIZE) <= most:
        return
    groups = columns // width
    # Beyond the end, the last row or token is read again and not stored.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe_row = tl.minimum(row, rows - 1)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    safe_token = tl.minimum(token, tokens - 1)
    # The product with a set that does not exist is undefined, but must not read beyond the tables.
    number = tl.minimum(tl.load(sets + safe_token), slots - 1).to(tl.int64)
    own = tl.where(number < 0, table, tables + number * rows * groups * ENTRIES)
    line = tl.arange(0, LINES)
    line_row = tl.minimum(tl.program_id(0) * ROWS + line // ENTRIES, rows - 1)
    entry = line % ENTRIES
    unit = tl.arange(0, UNITS)[None, None, :]
    column = tl.arange(0, STEP)[None, None, :]
    slot = tl.arange(0, SLOTS)
    result = tl.zeros((SLOTS, LINES, TOKENS), tl.float32)
    for part in range(columns // SLOTS // span):
        # The division hides the alignment from the compiler; without it, loads are 4 bytes wide.
        start = tl.multiple_of(slot * (columns // SLOTS) + part * span, 32)
        start_word = tl.multiple_of(start // CODES * WORDS, WORD_ALIGN)[:, None, None]
        at = (line_row[None, :] * groups + (start // width)[:, None]) * ENTRIES + entry[None, :]
        start = start[:, None, None]
        row_word = tl.multiple_of(safe_row * row_words, WORD_ALIGN)[None, :, None]
        keys = row_keys(safe_row, 0, seed)[None, :, None]
        sums = tl.zeros((SLOTS, LINES, TOKENS), tl.float32)
        for step in tl.range(tl.cdiv(span, STEP), num_stages=STAGES):
            done = step * STEP
            if HASHED:
                units = (start + done) // CODES + unit
                packed = hashed_unit(keys, units, BITS, CODES, WORDS)
            else:
                inside = None if EVEN else done + unit * CODES < span
                word = start_word + (step * UNITS + unit) * WORDS
                packed = stored_unit(words + row_word + word, inside, WORDS)
            inside = None if EVEN else done + column < span
            x_at = x + safe_token[None, :, None] * columns + (start + done + column)
            values = tl.load(x_at, mask=inside, other=None if EVEN else 0.0).to(DTYPE)
            marks = stack(one_hot(packed, entry, DTYPE, BITS, ASM))
            marks = by_lane(marks, SLOTS, LINES, UNITS, CODES, K_PER_LANE)
            values = by_lane(values, SLOTS, TOKENS, UNITS, CODES, K_PER_LANE)
            sums = tl.dot(marks, values.permute(0, 2, 1), sums, input_precision="ieee")
        entries = tl.load(own[None, None, :] + at[:, :, None]).to(DTYPE)
        result += sums * entries.to(tl.float32)
    result = tl.sum(tl.sum(result, axis=0).reshape(ROWS, ENTRIES, TOKENS), axis=1) / mark
    if HAS_BIAS:
        result += tl.load(bias + safe_row).to(tl.float32)[:, None]
    tl.store(
        y + token.to(tl.int64)[None, :] * rows + row[:, None],
        result.to(y.dtype.element_ty),
        mask=(token < tokens)[None, :] & (row < rows)[:, None],
    )


def launch_sums(
    x: Tensor,
    sets: Tensor,
    index_map: Tensor,
    table: Tensor,
    tables: Tensor,
    bias: Tensor | None,
    hash_seed: int | None,
    *,
    offsets: Tensor,
    most: int,
    size: int,
    y: Tensor,
) -> None:
    """Compute y[t] = x[t] W[sets[t]]^T + bias if the sets make more than some number of blocks.

    Args:
        x: float16 or bfloat16 [tokens, in_features].
        sets: Number of the set of each token, int64 or int32 [tokens]; -1 for `table`.
        index_map: Packed codes, uint8 [out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables of set -1, any float [out_features, groups, 2^bits], rounded to the dtype of
            x.
        tables: Tables of the other sets, [slots, out_features, groups, 2^bits], in the dtype of
            `table`.
        bias: Float [out_features], or None.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        offsets: Where the tokens of each set start and end, as `sort_tokens` returns it.
        most: The most blocks for which nothing is computed.
        size: The most tokens of a block.
        y: Where the result goes, as `new_result` makes it.
    """
    (tokens, columns), (rows, groups, entries) = x.shape, table.shape
    bits, width, slots = entries.bit_length() - 1, columns // groups, tables.shape[0]
    tile = sums_tile(bits, tokens, columns, width, hashed=hash_seed is not None)
    if INTERPRETED:  # it truncates to bfloat16 instead of rounding
        table, tables = table.to(x.dtype), tables.to(x.dtype)
    row_words, span = words_per_row(index_map), table_span(columns, width, tile.slots)
    with on(x.device):
        entry_sums_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(tokens, tile.tokens))](
            x.contiguous(),
            packed_words(index_map),
            table.contiguous(),
            tables.contiguous(),
            sets.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            offsets,
            most,
            slots,
            tokens,
            rows,
            columns,
            row_words,
            width,
            span,
            hash_seed or 0,
            1.0 if INTERPRETED else _MARKS[x.dtype],
            BITS=bits,
            CODES=UNIT_CODES[bits],
            WORDS=UNIT_WORDS[bits],
            HASHED=hash_seed is not None,
            HAS_BIAS=bias is not None,
            SETS=slots + 1,
            PADDED=triton.next_power_of_2(slots + 2),
            SIZE=size,
            EVEN=span % tile.columns == 0,
            WORD_ALIGN=4 if row_words % 4 == 0 and span * bits % 128 == 0 else 1,
            ASM=not INTERPRETED,
            DTYPE=tl.float32 if INTERPRETED else HALVES[x.dtype],
            K_PER_LANE=K_PER_LANE,
            SLOTS=tile.slots,
            ROWS=tile.rows,
            UNITS=tile.columns // UNIT_CODES[bits],
            TOKENS=tile.tokens,
            STAGES=tile.stages,
            num_warps=tile.slots,
            **register_limit(tile.registers),
            **OPTIONS,
        )
