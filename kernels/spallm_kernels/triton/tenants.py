"""Multiply tokens with a sketched weight on a GPU, each with the tables of its set.

There are two ways, and both are launched. How many sets the tokens have decides on the device which
of them computes and which returns at once, so the host does not wait:

* Few sets: programs take a tile of rows and a block of tokens of one set, and look weights up, as
  for a layer (`decode.py`). The tokens are sorted by set before, in a launch of its own.
* Many sets: inputs are summed by table entry, for all tokens alike (`entry_sums.py`).

For thousands of tokens of few sets, a dense weight for each is faster than both, but then the host
must know how many tokens there are of each. So only calls with more than GRAPH_TOKENS tokens wait
for that, and none while a CUDA graph is captured. Before a graph for more tokens is captured, the
kernels must have been compiled by a call with fewer.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from . import linear
from .decode import choose_tile, launch_decode
from .entry_sums import launch_sums
from .expert_blocks import most_blocks
from .launching import KEEPS_MARKS, new_result
from .set_blocks import sort_tokens
from .tiles import (
    DECODE_TOKENS,
    HASHED_DECODE_TOKENS,
    PORTABLE_DECODE_TOKENS,
    most_set_blocks,
    set_block_tokens,
)

#: The most tokens of a call that never waits for the device. Servers capture graphs of up to 512
#: tokens.
GRAPH_TOKENS = 512
_MOST_REGISTERS = 255  # of a thread
_MOST_ELEMENTS = 1 << 31  # of inputs or products: the kernel addresses them with 32 bits


def can_decode(x: Tensor, table: Tensor, *, hashed: bool) -> bool:
    """Return whether `decode` supports such tensors.

    Args:
        x: Inputs, float [tokens, in_features].
        table: Tables of one set, float [out_features, groups, 2^bits].
        hashed: Whether codes are computed, not stored.
    """
    elements = x.shape[0] * max(x.shape[1], table.shape[0])
    return elements < _MOST_ELEMENTS and linear.can_decode(x[:1], table)


def counts_first(x: Tensor) -> bool:
    """Return whether to wait for the number of tokens of each set, so as to choose by it."""
    capturing = x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return x.shape[0] > GRAPH_TOKENS and not capturing


def most_tokens(x: Tensor, table: Tensor, *, hashed: bool, portable: bool = False) -> float:
    """Return the most tokens of a set for which `decode` is the faster path."""
    if portable:
        return PORTABLE_DECODE_TOKENS
    return HASHED_DECODE_TOKENS if hashed else DECODE_TOKENS


def decode(
    x: Tensor,
    sets: Tensor,
    index_map: Tensor,
    table: Tensor,
    tables: Tensor,
    bias: Tensor | None = None,
    *,
    hash_seed: int | None = None,
    portable: bool = False,
) -> Tensor:
    """Compute y[t] = x[t] W[sets[t]]^T + bias.

    Args:
        x: float16 or bfloat16 [tokens, in_features].
        sets: Number of the set of each token, int64 or int32 [tokens]; -1 for `table`. Values are
            not checked.
        index_map: Packed codes, uint8 [out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables of set -1, any float [out_features, groups, 2^bits], rounded to the dtype of
            x.
        tables: Tables of the other sets, [slots, out_features, groups, 2^bits], in the dtype of
            `table`.
        bias: Float [out_features], or None.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        portable: Whether to look weights up by `tl.gather`, without assembly.

    Returns:
        y [tokens, out_features], in the dtype of x.
    """
    (tokens, columns), (rows, groups, entries) = x.shape, table.shape
    bits, slots, hashed = entries.bit_length() - 1, tables.shape[0], hash_seed is not None
    most = PORTABLE_DECODE_TOKENS if portable else DECODE_TOKENS
    size = set_block_tokens(tokens, 1 + slots, most)
    sizes = bits, size, columns, columns // groups
    tile = choose_tile(*sizes, index_map, hashed=hashed, portable=portable)
    if tile.tokens == 16:
        # The tile of a layer would spill registers at 3 bits. Shared memory allows two of these
        # programs per multiprocessor, so there are enough.
        tile = dataclasses.replace(tile, registers=_MOST_REGISTERS)
    size = 1 if size == 1 else tile.tokens
    order, offsets = sort_tokens(sets, slots)
    blocks = most_blocks(tokens, 1 + slots, size)
    few = min(blocks, most_set_blocks(bits, tokens)) if KEEPS_MARKS and not portable else blocks
    y = new_result(x, rows)
    launch_decode(
        x,
        index_map,
        table,
        bias,
        rows,
        hash_seed,
        tile,
        one=size == 1,
        portable=portable,
        offsets=offsets,
        blocks=few,
        tables=tables,
        order=order,
        y=y,
    )
    if few < blocks:
        operands = x, sets, index_map, table, tables, bias, hash_seed
        launch_sums(*operands, offsets=offsets, most=few, size=size, y=y)
    return y.to(x.dtype)
