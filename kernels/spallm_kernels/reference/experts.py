"""State the products of tokens with the sketched weights of their experts, in plain torch.

    y[t] = W[e] x[t]        for the tokens t from offsets[e] to offsets[e + 1]

It is not optimised, because every other backend is compared with it.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .linear import dequantize


def can_decode(x: Tensor, table: Tensor, *, hashed: bool) -> bool:
    """Return True: `decode` supports all tensors."""
    return True


def decode(
    x: Tensor, offsets: Tensor, index_map: Tensor, table: Tensor, *, hash_seed: int | None = None
) -> Tensor:
    """Return the products of tokens with the weights of their experts.

    Args:
        x: Float [tokens, in_features], sorted by expert.
        offsets: Where the tokens of each expert start and end, int64 or int32 [experts + 1],
            ascending from 0 to at most the number of tokens.
        index_map: Packed codes, uint8 [experts, out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables, float [experts, out_features, groups, 2^bits], rounded to the dtype of x.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
            Rows are numbered through all experts.

    Returns:
        y [tokens, out_features], in the dtype of x.
    """
    y = x.new_zeros(x.shape[0], table.shape[1])
    for expert, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if start < end:
            weight = dequantize(
                index_map[expert],
                table[expert].to(x.dtype),
                x.shape[1],
                hash_seed=hash_seed,
                first_row=expert * table.shape[1],
            )
            torch.mm(x[start:end], weight.T, out=y[start:end])
    return y
