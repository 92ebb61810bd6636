"""State products with a sketched weight whose tables depend on the token, in plain torch.

    y[t] = W[sets[t]] x[t]        W[s][o, i] = tables[s][o, i // (in_features / groups), code[o, i]]

It is not optimised, because every other backend is compared with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import dequantize


def can_decode(x: Tensor, table: Tensor, *, hashed: bool) -> bool:
    """Return True: `decode` supports all tensors."""
    return True


def counts_first(x: Tensor) -> bool:
    """Return False: all sets are treated alike."""
    return False


def most_tokens(x: Tensor, table: Tensor, *, hashed: bool) -> float:
    """Return infinity: `decode` is the only path."""
    return float("inf")


def decode(
    x: Tensor,
    sets: Tensor,
    index_map: Tensor,
    table: Tensor,
    tables: Tensor,
    bias: Tensor | None = None,
    *,
    hash_seed: int | None = None,
) -> Tensor:
    """Return the products of tokens with the weights of their sets.

    Args:
        x: Float [tokens, in_features].
        sets: Number of the set of each token, int64 or int32 [tokens]; -1 for `table`.
        index_map: Packed codes, uint8 [out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables of set -1, float [out_features, groups, 2^bits], rounded to the dtype of x.
        tables: Tables of the other sets, float [slots, out_features, groups, 2^bits].
        bias: Float [out_features], or None.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.

    Returns:
        y [tokens, out_features], in the dtype of x.
    """
    y = x.new_empty(x.shape[0], table.shape[0])
    for number in sorted(set(sets.tolist())):
        own = table if number < 0 else tables[number]
        weight = dequantize(index_map, own.to(x.dtype), x.shape[1], hash_seed=hash_seed)
        chosen = sets == number
        y[chosen] = torch.nn.functional.linear(x[chosen], weight, bias)
    return y
