"""Sort tokens by the set of tables that they use, and find the set of a block of tokens.

Sets are the experts of `expert_blocks.py` with the same codes: set 0 has the tables of the base,
set n + 1 the tables of slot n. Tokens stay where they are, and `order` lists them by set.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import on
from .expert_blocks import find_block

#: The most tokens that one launch sorts. It compares every token with all others; for more tokens,
#: torch sorts in several launches.
MOST_COMPARED = 1024
_BLOCK = 64


def sort_tokens(sets: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Sort tokens by set, on their device and in shapes that do not depend on data.

    Args:
        sets: Number of the slot of each token, int64 or int32 [tokens]; -1 for the base.
        slots: Number of slots.

    Returns:
        The tokens in order, int [tokens], and where the tokens of each set start and end in it, int
        [slots + 2], as `find_block` takes it.
    """
    tokens = sets.shape[0]
    if tokens > MOST_COMPARED:
        ascending, order = torch.sort(sets, stable=True)
        starts = torch.arange(-1, slots + 1, dtype=sets.dtype, device=sets.device)
        return order, torch.searchsorted(ascending, starts)
    order = torch.empty(tokens, dtype=torch.int32, device=sets.device)
    offsets = torch.empty(slots + 2, dtype=torch.int32, device=sets.device)
    with on(sets.device):
        sort_tokens_kernel[(triton.cdiv(max(tokens, slots + 2), _BLOCK),)](
            sets.contiguous(), order, offsets, tokens, slots + 2, BLOCK=_BLOCK, num_warps=4
        )
    return order, offsets


@triton.jit
def sort_tokens_kernel(sets, order, offsets, tokens, bounds, BLOCK: tl.constexpr):
    """Write the places of a block of tokens, and a block of offsets (see `sort_tokens`)."""
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(sets + mine, mask=mine < tokens, other=0)[:, None]
    place = tl.zeros((BLOCK,), tl.int32)
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, tokens, BLOCK):
        other = start + tl.arange(0, BLOCK)
        there = (other < tokens)[None, :]
        found = tl.load(sets + other, mask=other < tokens, other=0)[None, :]
        earlier = (found < own) | ((found == own) & (other[None, :] < mine[:, None]))
        place += tl.sum((earlier & there).to(tl.int32), 1)
        before += tl.sum(((found + 1 < mine[:, None]) & there).to(tl.int32), 1)
    tl.store(order + place, mine, mask=mine < tokens)
    tl.store(offsets + mine, before, mask=mine < bounds)


@triton.jit
def count_blocks(offsets, SETS: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr):
    """Return how many blocks the tokens of sets that exist make. See `find_block`."""
    number = tl.arange(0, PADDED)
    there = number < SETS
    start = tl.load(offsets + number, mask=there, other=0).to(tl.int32)
    end = tl.load(offsets + number + 1, mask=there, other=0).to(tl.int32)
    return tl.sum((end - start + SIZE - 1) // SIZE, 0)


@triton.jit
def to_set(
    table,
    tables,
    offsets,
    tokens,
    entries,
    SETS: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Find the set of the block of tokens that a program processes.

    Return its table, the place of the first token in the order, and how many tokens there are: none
    for a set that does not exist, and none if the sets make more blocks than there are programs.

    Blocks are numbered along the first dimension of the grid. entries: of all tables of a set. See
    `decode_kernel` and `find_block` for the other arguments.
    """
    number, first, count = find_block(offsets, tokens, tl.program_id(0), SETS, PADDED, SIZE)
    many = count_blocks(offsets, SETS, PADDED, SIZE) > tl.num_programs(0)
    # All tables of all sets may have more than 2^31 entries.
    slot = tables + (number.to(tl.int64) - 1) * entries
    table = tl.where(number == 0, table, slot)
    return table, first, tl.where(many | (number == SETS), 0, count)


@triton.jit
def line_of(order, token, tokens, SETS: tl.constexpr):
    """Return where tokens of a block lie among all tokens; missing ones have another's place."""
    if SETS:
        return tl.load(order + tl.minimum(token, tokens - 1)).to(tl.int32)
    else:
        return token
