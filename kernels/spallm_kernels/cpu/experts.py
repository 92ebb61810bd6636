"""Multiply tokens with the sketched weights of their experts, in vector registers.

One compiled call serves all experts: threads start once, and each takes the same share of the rows
of every expert, however unevenly the tokens are spread. Experts without tokens are not touched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from . import linear, vectorized
from .rows import ROWS, compiled, finish_rows, multiply_rows, own_inputs, widen_once, widened
from .vector_units import host_unit
from .vectorized import KINDS, SERIAL, kind_of


def can_decode(x: Tensor, table: Tensor, *, hashed: bool) -> bool:
    """Return whether `decode` supports such tensors and is the faster path.

    Args:
        x: Inputs, float [tokens, in_features].
        table: Tables, float [experts, out_features, groups, 2^bits].
        hashed: Whether codes are computed, not stored.
    """
    # The path is chosen by the mean number of tokens of an expert.
    tokens, one = -(-x.shape[0] // max(1, table.shape[0])), table[:1].flatten(0, 1)
    rounded = one if x.dtype == torch.float32 else one.to(x.dtype)
    return (
        linear.can_decode(x, one)
        and vectorized.supports(rounded, x.shape[1], 0 if hashed else None)
        and tokens <= linear.vector_tokens(x, one, hashed=hashed)
    )


def decode(
    x: Tensor, offsets: Tensor, index_map: Tensor, table: Tensor, *, hash_seed: int | None = None
) -> Tensor:
    """Compute the products of tokens and the weights of their experts, summed in float32.

    Args:
        x: Float [tokens, in_features], sorted by expert, for which `can_decode` returned True.
        offsets: Where the tokens of each expert start and end, int64 or int32 [experts + 1],
            ascending from 0 to at most the number of tokens.
        index_map: Packed codes, uint8 [experts, out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables, any float [experts, out_features, groups, 2^bits], rounded to the dtype of x.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.

    Returns:
        y [tokens, out_features], in the dtype of x.
    """
    (tokens, columns), (_, rows, groups, entries) = x.shape, table.shape
    bounds = offsets.long().contiguous().numpy()
    kind = kind_of(table.dtype, x.dtype)
    if kind is None:
        table, kind = _rounded(table, x.dtype, bounds), KINDS[x.dtype]
    x, table, index_map = x.contiguous(), table.contiguous(), index_map.contiguous()
    y = x.new_empty(tokens, rows)
    y[bounds[-1] :] = 0
    sums = y if x.dtype == torch.float32 else y.new_empty(tokens, rows, dtype=torch.float32)
    parallel = rows * columns * tokens > SERIAL
    shares = numba.get_num_threads() if parallel else 1
    wide, copies = widened(x, shares)
    unit = host_unit()
    assert unit is not None
    kernel = _product(
        unit.key,
        unit.tiles,
        entries.bit_length() - 1,
        kind,
        KINDS[x.dtype],
        int(hash_seed is not None),
        parallel,
    )
    kernel(
        bounds,
        index_map.data_ptr(),
        index_map.shape[2],
        table.data_ptr(),
        groups,
        columns // groups,
        hash_seed or 0,
        rows,
        x.data_ptr(),
        wide.data_ptr(),
        copies,
        sums.data_ptr(),
        y.data_ptr(),
        tokens,
        shares,
    )
    return y


def _rounded(table: Tensor, dtype: torch.dtype, bounds: Any) -> Tensor:
    """Return tables in another dtype. Those of experts without tokens have any value."""
    rounded = torch.empty_like(table, dtype=dtype, memory_format=torch.contiguous_format)
    for expert in np.flatnonzero(np.diff(bounds)).tolist():
        rounded[expert] = table[expert]
    return rounded


@functools.cache
def _product(
    unit: str,
    tiles: tuple[int, int, int, int, int],
    bits: int,
    kind: str,
    x_kind: str,
    hashed: int,
    parallel: bool,
) -> Callable[..., None]:
    """Return the compiled products for a kind of sketch. Numba keeps them on disk."""
    high, middle, low, tall, many = tiles
    size = 4 if x_kind == "float32" else 2

    def multiply(  # type: ignore[no-untyped-def]
        bounds, codes, code_stride, table, groups, width, seed, rows, x, wide, copies, sums, y,
        all_tokens, shares
    ):  # fmt: skip
        count, blocks = all_tokens * groups * width, (rows + ROWS - 1) // ROWS
        widen_once(x, wide, count, copies, x_kind)
        # Every thread gets a share of each expert.
        for share in numba.prange(shares):
            own = own_inputs(x, wide, count, copies, share, x_kind)
            for expert in range(len(bounds) - 1):
                start, tokens = bounds[expert], bounds[expert + 1] - bounds[expert]
                if tokens == 0:
                    continue
                # Rows are numbered through all experts, so y is addressed as if it had all of them.
                row = expert * rows
                for block in range(share * blocks // shares, (share + 1) * blocks // shares):
                    first, end = block * ROWS, min(rows, (block + 1) * ROWS)
                    multiply_rows(
                        codes, code_stride, table, groups, width, seed, row + first, row + end,
                        own + start * 4 * groups * width, sums + 4 * (start * rows - row), 4 * rows,
                        tokens, unit, high, middle, low, tall, many, bits, kind, hashed
                    )  # fmt: skip
                    finish_rows(
                        sums + 4 * start * rows, 0, y + size * start * rows, rows, first, end,
                        tokens, x_kind
                    )  # fmt: skip

    return compiled(multiply, parallel)
