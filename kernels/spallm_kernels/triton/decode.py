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

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import hashed_unit, row_keys, stored_unit
from .device import on
from .expert_blocks import to_expert
from .launching import (
    HALVES,
    INTERPRETED,
    K_PER_LANE,
    OPTIONS,
    new_result,
    packed_words,
    register_limit,
    words_per_row,
)
from .lookup import by_lane, look_up, prepare, stack
from .ptx import UNIT_CODES, UNIT_WORDS
from .set_blocks import line_of, to_set
from .tiles import DecodeTile, decode_tile, portable_decode_tile, table_span


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
        entries_of_set = rows * (columns // width) * 2**BITS
        table, first, tokens = to_set(
            table, tables, offsets, tokens, entries_of_set, EXPERTS, PADDED, SIZE
        )
        order += first
        if tokens <= 0:
            return
    elif EXPERTS:
        x, words, table, y, first_row, tokens = to_expert(
            x, words, table, y, offsets, tokens, rows, columns, row_words, columns // width,
            EXPERTS, PADDED, SIZE, TOKENS, ROWS, 2**BITS, WORD_ALIGN
        )  # fmt: skip
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
            weights = by_lane(weights, SLOTS, ROWS, UNITS, CODES, K_PER_LANE)
            values = by_lane(values, SLOTS, TOKENS, UNITS, CODES, K_PER_LANE)
            total = tl.dot(weights, values.permute(0, 2, 1), total, input_precision="ieee")
    result = tl.sum(total, axis=0)
    if HAS_BIAS:
        result += tl.load(bias + safe_row).to(tl.float32)[:, None]
    tl.store(
        y + line_of(order, token, tokens, SETS)[None, :] * rows + row[:, None],
        result.to(y.dtype.element_ty),
        mask=(token < tokens)[None, :] & (row < rows)[:, None],
    )


def choose_tile(
    bits: int,
    tokens: int,
    columns: int,
    width: int,
    index_map: Tensor,
    *,
    hashed: bool,
    portable: bool,
) -> DecodeTile:
    """Return the tile of the decode kernel on the device of an index map.

    Args:
        bits: Bits of a code, 2 to 4.
        tokens: Number of inputs.
        columns: Columns of the layer.
        width: Columns of a group.
        index_map: Packed codes, uint8 [..., row_bytes].
        hashed: Whether codes are computed, not stored.
        portable: Whether weights are looked up without assembly.
    """
    if portable:
        return _portable_tile(tokens, columns, width)
    generation, aligned = _generation(index_map.device), words_per_row(index_map) % 4 == 0
    return _tile(bits, tokens, columns, width, generation, hashed=hashed, aligned=aligned)


def launch_decode(
    x: Tensor,
    index_map: Tensor,
    table: Tensor,
    bias: Tensor | None,
    rows: int,
    hash_seed: int | None,
    tile: DecodeTile,
    *,
    one: bool,
    portable: bool,
    offsets: Tensor | None = None,
    blocks: int = 1,
    tables: Tensor | None = None,
    order: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """Launch the decode kernel for one weight, for those of experts, or for sets of tables.

    Args:
        x: float16 or bfloat16 [tokens, in_features].
        index_map: Packed codes, uint8 [all rows, row_bytes]; ignored with `hash_seed`.
        table: Tables, any float [all rows, groups, 2^bits], rounded to the dtype of x.
        bias: Float [rows], or None.
        rows: Rows of a weight.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        tile: Share of one program.
        one: Whether a program has one token, not `tile.tokens`.
        portable: Whether to look weights up by `tl.gather`, without assembly.
        offsets: Tokens of each expert (see `expert_blocks.py`); None if there is one weight.
        blocks: Blocks of tokens, each of one expert or set. If sets make more blocks, nothing is
            computed.
        tables: Tables of the sets behind the first one, float [slots, rows, groups, 2^bits] in the
            dtype of `table`; None if tokens have no sets.
        order: Tokens sorted by set, int [tokens]; `offsets` then counts in this order.
        y: Where the result goes, as `new_result` makes it; None: anew.

    Returns:
        y [tokens, rows], in the dtype of x.
    """
    (tokens, columns), (all_rows, groups, entries) = x.shape, table.shape
    bits, width = entries.bit_length() - 1, columns // groups
    experts = 0 if offsets is None else all_rows // rows
    if tables is not None:
        experts = 1 + tables.shape[0]
        tables = (tables.to(x.dtype) if INTERPRETED else tables).contiguous()
    words, row_words = packed_words(index_map), words_per_row(index_map)
    quad = 4 if tile.quads else 1
    codes = quad * UNIT_CODES[bits]
    # The interpreter truncates to bfloat16 instead of rounding, so torch rounds the table first.
    table = table.to(x.dtype) if INTERPRETED else table
    y = new_result(x, rows) if y is None else y
    span = table_span(columns, width, tile.slots)
    grid = triton.cdiv(rows, tile.rows), blocks
    with on(x.device):
        # Programs of the same rows run one after another if they share codes.
        decode_kernel[grid if tables is None else grid[::-1]](
            x.contiguous(),
            words,
            table.contiguous(),
            tables,
            None if bias is None else bias.contiguous(),
            y,
            offsets,
            order,
            tokens,
            rows,
            columns,
            row_words,
            width,
            span,
            hash_seed or 0,
            BITS=bits,
            CODES=codes,
            WORDS=quad * UNIT_WORDS[bits],
            HASHED=hash_seed is not None,
            HAS_BIAS=bias is not None,
            EXPERTS=experts,
            SETS=tables is not None,
            PADDED=triton.next_power_of_2(experts + 1),
            EVEN=span % tile.columns == 0,
            WORD_ALIGN=4 if row_words % 4 == 0 and span * bits % 128 == 0 else 1,
            ASM=not (INTERPRETED or portable),
            DTYPE=tl.float32 if INTERPRETED else HALVES[x.dtype],
            K_PER_LANE=K_PER_LANE,
            SLOTS=tile.slots,
            ROWS=tile.rows,
            UNITS=tile.columns // codes,
            TOKENS=tile.tokens,
            ONE=one,
            STAGES=tile.stages,
            num_warps=tile.slots,
            **register_limit(tile.registers),
            **OPTIONS,
        )
    return y.to(x.dtype) if INTERPRETED else y


#: Tiles depend on a few numbers per layer, and computing one takes half as long as a launch.
_tile = functools.lru_cache(maxsize=1024)(decode_tile)
_portable_tile = functools.lru_cache(maxsize=1024)(portable_decode_tile)


@functools.cache
def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
