"""Multiply tokens with the sketched weights of their experts on a GPU, in one launch.

Programs take a tile of rows and a block of tokens of one expert, and run the kernel of a layer
(`decode.py`). The host does not wait for the offsets. With more tokens than `can_decode` accepts,
dense weights of several experts at a time are faster (`spallm_kernels/grouped.py`).
"""

from __future__ import annotations

from torch import Tensor

from . import linear
from .decode import choose_tile, launch_decode
from .expert_blocks import most_blocks
from .tiles import (
    DECODE_TOKENS,
    HASHED_DECODE_TOKENS,
    PORTABLE_DECODE_TOKENS,
    DecodeTile,
    block_tokens,
)


def can_decode(x: Tensor, table: Tensor, *, hashed: bool, portable: bool = False) -> bool:
    """Return whether `decode` supports such tensors and is the faster path.

    That depends on shapes only, so on the tokens of an expert on average.

    Args:
        x: Inputs, float [tokens, in_features].
        table: Tables, float [experts, out_features, groups, 2^bits].
        hashed: Whether codes are computed, not stored.
        portable: Whether weights are looked up without assembly.
    """
    most = HASHED_DECODE_TOKENS if hashed else DECODE_TOKENS
    if portable:
        most = PORTABLE_DECODE_TOKENS
    few = 0 < x.shape[0] <= most * table.shape[0]
    return few and linear.can_decode(x[:1], table[0])


def decode(
    x: Tensor,
    offsets: Tensor,
    index_map: Tensor,
    table: Tensor,
    *,
    hash_seed: int | None = None,
    tile: DecodeTile | None = None,
    portable: bool = False,
) -> Tensor:
    """Compute the products of tokens and the weights of their experts.

    Args:
        x: float16 or bfloat16 [tokens, in_features], sorted by expert.
        offsets: Where the tokens of each expert start and end, int64 or int32 [experts + 1],
            ascending from 0 to at most the number of tokens. They are not checked.
        index_map: Packed codes, uint8 [experts, out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables, any float [experts, out_features, groups, 2^bits], rounded to the dtype of x.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        tile: Share of one program, for more than one token; by default chosen by shape.
        portable: Whether to look weights up by `tl.gather`, without assembly.

    Returns:
        y [tokens, out_features], in the dtype of x.
    """
    (tokens, columns), (experts, rows, groups, entries) = x.shape, table.shape
    size = block_tokens(tokens, experts) if tile is None else tile.tokens
    if tile is None:
        sizes = entries.bit_length() - 1, size, columns, columns // groups
        hashed = hash_seed is not None
        tile = choose_tile(*sizes, index_map, hashed=hashed, portable=portable)
    size = 1 if size == 1 else tile.tokens
    return launch_decode(
        x,
        index_map.flatten(0, 1),
        table.flatten(0, 1),
        None,
        rows,
        hash_seed,
        tile,
        one=size == 1,
        portable=portable,
        offsets=offsets.contiguous(),
        blocks=most_blocks(tokens, experts, size),
    )
