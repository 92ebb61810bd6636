"""Multiply tokens with a sketched weight, each with the tables of its set, in vector registers.

Blocks of rows are shared among the threads. For a block, tokens of the same set are multiplied in
tiles of four, as for a layer. The tokens that remain of all sets are multiplied in tiles where each
has tables of its own (see `mixed_tiles.py`). So the packed codes of a block are read from memory
once, and unpacked once per tile, whatever the sets are. Groups that are not whole steps of 16
columns have no such tiles: there each token that remains is multiplied alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from . import linear, matrix, vectorized
from .mixed_tiles import FIELDS, NUMBER_BYTES, multiply_mixed_tile
from .rows import ROWS, compiled, multiply_rows
from .vector_units import host_unit
from .vectorized import KINDS, SERIAL, kind_of

#: Tokens of a tile of `multiply_rows`.
_TILE = 4
#: The most tokens of a set to look up with those of other sets, although there are tile registers.
#: Four tokens of a 4096 x 4096 weight take as long either way.
_BEFORE_MATRIX = 4


def can_decode(x: Tensor, table: Tensor, *, hashed: bool) -> bool:
    """Return whether `decode` supports such tensors.

    Args:
        x: Inputs, float [tokens, in_features].
        table: Tables of one set, float [out_features, groups, 2^bits].
        hashed: Whether codes are computed, not stored.
    """
    rounded = table[:0] if x.dtype == torch.float32 else table[:0].to(x.dtype)
    return linear.can_decode(x, table) and vectorized.supports(
        rounded, x.shape[1], 0 if hashed else None
    )


def counts_first(x: Tensor) -> bool:
    """Return True: the number of tokens of each set is known at once."""
    return True


def most_tokens(x: Tensor, table: Tensor, *, hashed: bool) -> float:
    """Return the most tokens of a set for which `decode` is the faster path."""
    if matrix.supports(x, table, 0 if hashed else None):
        return _BEFORE_MATRIX
    return linear.vector_tokens(x, table, hashed=hashed)


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
    """Compute y[t] = x[t] W[sets[t]]^T + bias, summed in float32.

    Args:
        x: Float [tokens, in_features], for which `can_decode` returned True.
        sets: Number of the set of each token, int64 or int32 [tokens]; -1 for `table`.
        index_map: Packed codes, uint8 [out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables of set -1, any float [out_features, groups, 2^bits], rounded to the dtype of
            x.
        tables: Tables of the other sets, [slots, out_features, groups, 2^bits], in the dtype of
            `table`.
        bias: Float [out_features], or None.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.

    Returns:
        y [tokens, out_features], in the dtype of x.
    """
    (tokens, columns), (rows, groups, entries) = x.shape, table.shape
    dtype = x.dtype
    table, tables, kind = _readable(table, tables, dtype)
    index_map = index_map.contiguous()
    order = torch.argsort(sets, stable=True)
    x = x[order].float()
    # Not torch's default dtype and device, which a caller may have set.
    y = x.new_empty(tokens, rows)
    places, alike = _share_out(
        sets[order].numpy(),
        table.data_ptr(),
        tables.data_ptr(),
        tables.stride(0) * tables.element_size(),
        x.data_ptr(),
        4 * columns,
        y.data_ptr(),
        4 * rows,
    )
    unit = host_unit()
    assert unit is not None
    kernel = _product(
        unit.key,
        unit.tiles,
        entries.bit_length() - 1,
        kind,
        int(hash_seed is not None),
        rows * columns * tokens > SERIAL,
    )
    kernel(
        places,
        alike,
        index_map.data_ptr(),
        index_map.shape[1],
        groups,
        columns // groups,
        hash_seed or 0,
        rows,
    )
    if bias is not None:
        y += bias
    result = y.new_empty(tokens, rows, dtype=dtype)
    result[order] = y if dtype == torch.float32 else y.to(dtype)
    return result


def _readable(table: Tensor, tables: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, str]:
    """Return tables as the kernel reads them, copied only if they must be, and their kind."""
    kind = kind_of(table.dtype, dtype)
    if kind is None:
        table, tables, kind = table.to(dtype), tables.to(dtype), KINDS[dtype]
    # Sets may be apart, as in a view of the tables of several layers.
    whole = all(each.is_contiguous() for each in tables[:1])
    return table.contiguous(), tables if whole else tables.contiguous(), kind


@numba.njit(cache=True)
def _share_out(  # type: ignore[no-untyped-def]
    sets, base, first_slot, slot_bytes, x, x_stride, y, y_stride
):  # fmt: skip
    """Return what to multiply: tokens of the same set, then an even number of any tokens.

    Args:
        sets: Number of the set of each token, ascending.
        base: Address of the tables of set -1.
        first_slot: Address of the tables of set 0.
        slot_bytes: Bytes from the tables of a set to those of the next one.
        x: Address of the first token.
        x_stride: Bytes from a token to the next one.
        y: Address of the product of the first token with row 0.
        y_stride: Bytes from a product to that of the next token with the same row.

    Returns:
        int64 [n, FIELDS], and the number of lines with tokens of the same set. The lines behind
        them have one token each.
    """
    tokens = len(sets)
    alike, mixed = np.empty((tokens, FIELDS), np.int64), np.empty((tokens, FIELDS), np.int64)
    used = alone = start = 0
    while start < tokens:
        end = start + 1
        while end < tokens and sets[end] == sets[start]:
            end += 1
        own = base if sets[start] < 0 else first_slot + sets[start] * slot_bytes
        whole = start + (end - start) // _TILE * _TILE
        if whole > start:
            alike[used] = own, x + start * x_stride, y + start * y_stride, whole - start
            used += 1
        for token in range(whole, end):
            mixed[alone] = own, x + token * x_stride, y + token * y_stride, 1
            alone += 1
        start = end
    if alone % 2:
        alone -= 1
        alike[used] = mixed[alone]
        used += 1
    return np.concatenate((alike[:used], mixed[:alone])), used


# Numba copies the code to where it is called, so that constants stay constants.
@numba.njit(inline="always")
def _multiply_mixed(  # type: ignore[no-untyped-def]
    codes, code_stride, mixed, tokens, groups, width, seed, first, end, unit, bits, kind, hashed
):  # fmt: skip
    """Multiply tokens, each with its own tables, with the rows from `first` to `end`.

    Args:
        mixed: Address of the tokens' places.
        tokens: An even number.
        first: Number of the first row.
        end: Number of the row behind the last one. The number of rows is a multiple of 4.
    """
    line = FIELDS * NUMBER_BYTES
    token = 0
    while token + 4 <= tokens:
        for row in range(first, end, 2):
            multiply_mixed_tile(
                codes, code_stride, mixed + token * line, groups, width, seed, row,
                unit, bits, kind, hashed, 2, 4
            )  # fmt: skip
        token += 4
    if token < tokens:
        for row in range(first, end, 4):
            multiply_mixed_tile(
                codes, code_stride, mixed + token * line, groups, width, seed, row,
                unit, bits, kind, hashed, 4, 2
            )  # fmt: skip


@functools.cache
def _product(
    unit: str,
    tiles: tuple[int, int, int, int, int],
    bits: int,
    kind: str,
    hashed: int,
    parallel: bool,
) -> Callable[..., Any]:
    """Return the compiled products for a kind of sketch. Numba keeps them on disk."""
    high, middle_rows, low, tall, many = tiles

    def multiply(  # type: ignore[no-untyped-def]
        places, alike, codes, code_stride, groups, width, seed, rows
    ):  # fmt: skip
        for task in numba.prange((rows + ROWS - 1) // ROWS):
            first, end = task * ROWS, min(rows, (task + 1) * ROWS)
            # Tokens of any sets are mixed up to this row, and multiplied alone from there on.
            middle = first if width % 16 else end - (end - first) % 4
            _multiply_mixed(
                codes, code_stride, places[alike:].ctypes.data, len(places) - alike, groups, width,
                seed, first, middle, unit, bits, kind, hashed
            )  # fmt: skip
            for run in range(len(places)):
                multiply_rows(
                    codes, code_stride, places[run, 0], groups, width, seed,
                    first if run < alike else middle, end,
                    places[run, 1], places[run, 2], 4 * rows, places[run, 3],
                    unit, high, middle_rows, low, tall, many, bits, kind, hashed
                )  # fmt: skip

    return compiled(multiply, parallel)
