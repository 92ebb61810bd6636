"""Find the expert that a block of tokens belongs to, inside a kernel.

The tokens of each expert are split into blocks of at most SIZE tokens, and blocks are numbered
through all experts. Where they begin depends on data, but how many there are at most follows from
shapes: the first block of an expert takes at least one token, and all others before the last are
full. So no host needs to know the offsets, and a CUDA graph can be captured.

Tokens behind the last offset, which belong to no expert, are treated as those of one more.
"""

from __future__ import annotations

import triton
import triton.language as tl


def most_blocks(tokens: int, experts: int, size: int) -> int:
    """Return the most blocks of at most `size` tokens that the tokens of experts can make."""
    used = min(tokens, experts + 1)
    return used + (tokens - used) // size


@triton.jit
def find_block(
    offsets, tokens, block, EXPERTS: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr
):
    """Return the expert of a block, its first token, and its number of tokens.

    The expert of tokens that belong to none is EXPERTS. A block that does not exist has no tokens.

    offsets: pointer to EXPERTS + 1 integers, ascending from 0 to at most the number of tokens.
    PADDED: a power of two above EXPERTS.
    """
    number = tl.arange(0, PADDED)
    start = tl.load(offsets + number, mask=number <= EXPERTS, other=tokens).to(tl.int32)
    end = tl.load(offsets + number + 1, mask=number < EXPERTS, other=tokens).to(tl.int32)
    blocks = (end - start + SIZE - 1) // SIZE
    behind = tl.cumsum(blocks, 0)  # number of the block behind the expert's last one
    expert = tl.sum((behind <= block).to(tl.int32), 0)
    here = number == expert
    before = tl.sum(tl.where(here, behind - blocks, 0), 0)
    first = tl.sum(tl.where(here, start, 0), 0) + (block - before) * SIZE
    return expert, first, tl.minimum(tl.sum(tl.where(here, end, 0), 0) - first, SIZE)


@triton.jit
def to_expert(
    x,
    words,
    table,
    y,
    offsets,
    tokens,
    rows,
    columns,
    row_words,
    groups,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    WORD_ALIGN: tl.constexpr,
):
    """Move pointers to the expert and to the first token of the block that a program processes.

    Return them, the number of the expert's first row, and the number of tokens to process. For
    tokens of no expert zeros are written, and the number is zero.

    The first four arguments point to the operands of all experts. TOKENS: a power of two of at
    least SIZE. See `decode_kernel` and `find_block` for the others.
    """
    block = tl.program_id(1)
    expert, first, tokens = find_block(offsets, tokens, block, EXPERTS, PADDED, SIZE)
    # All rows of all experts may have more than 2^31 entries.
    first_row = expert.to(tl.int64) * rows
    words += tl.multiple_of(first_row * row_words, WORD_ALIGN)
    table += first_row * groups * ENTRIES
    x += first.to(tl.int64) * columns
    y += first.to(tl.int64) * rows
    if expert == EXPERTS:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
        token = tl.arange(0, TOKENS)[:, None]
        nothing = tl.zeros((TOKENS, ROWS), y.dtype.element_ty)
        tl.store(y + token * rows + row, nothing, mask=(token < tokens) & (row < rows))
        tokens = 0
    return x, words, table, y, first_row, tokens
