"""Multiply bfloat16 inputs with a sketched weight by AVX512-BF16 and AMX, in parallel over rows.

Two instructions multiply bfloat16 and add up in float32. A token alone, or one with tables of its
own, is multiplied by dot products (see `dot_tiles.py`). Tokens that share tables are multiplied as
a matrix, 16 at a time (see `matrix_tiles.py`), if the processor has AMX. Both read 16-bit inputs as
they are, and look 32 weights up at once.

The instructions take subnormal numbers for 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .bfloat16_steps import WIDE_STEP
from .dot_tiles import FIELDS, multiply_dot_tile
from .matrix_tiles import (
    MOST_BLOCKS,
    ROWS,
    TOKENS,
    configure_tiles,
    multiply_matrix,
    release_tiles,
)
from .packing import pack
from .rows import OWN_INPUTS, compiled, finish_rows
from .vector_units import host_unit
from .vectorized import SERIAL

#: The fewest tokens to multiply as a matrix.
MATRIX_TOKENS = 2
_KINDS = {torch.bfloat16: "bfloat16", torch.float32: "rounded_bfloat16"}


def supports(x: Tensor, table: Tensor, hash_seed: int | None, *, mixed: bool = False) -> bool:
    """Return whether this machine multiplies such tensors by instructions for bfloat16.

    Args:
        x: Inputs, float [tokens, in_features].
        table: Tables, float [out_features, groups, 2^bits] for which `vectorized.supports` returned
            True.
        hash_seed: Seed of the `hash` mapping; None if codes are stored.
        mixed: Whether tokens have tables of their own.
    """
    unit = host_unit()
    if unit is None or x.dtype != torch.bfloat16 or hash_seed is not None:
        return False
    if mixed or x.shape[0] < MATRIX_TOKENS:
        return unit.has_dot and table.dtype in _KINDS
    return unit.has_matrix and table.dtype in _KINDS


def decode(x: Tensor, index_map: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W^T + bias for tensors that `supports` returned True for.

    Args:
        x: bfloat16 [tokens, in_features].
        index_map: Packed codes, uint8 [out_features, row_bytes].
        table: Tables, bfloat16 or float32 [out_features, groups, 2^bits], rounded to bfloat16.
        bias: bfloat16 [out_features], or None.

    Returns:
        y [tokens, out_features], bfloat16. Products are summed in float32.
    """
    if x.shape[0] >= MATRIX_TOKENS:
        return _decode_matrix(x, index_map, table, bias)
    return decode_sets(x, None, index_map, table, table[None], bias)


def decode_sets(
    x: Tensor,
    sets: Tensor | None,
    index_map: Tensor,
    table: Tensor,
    tables: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Compute y[t] = x[t] W[sets[t]]^T + bias, where weights differ in their tables.

    Args:
        x: bfloat16 [tokens, in_features].
        sets: Number of the set of each token, int64 or int32 [tokens]; -1 for `table`. None: all
            have `table`.
        index_map: Packed codes, uint8 [out_features, row_bytes].
        table: Tables, bfloat16 or float32 [out_features, groups, 2^bits], rounded to bfloat16.
        tables: Tables of the other sets, [slots, out_features, groups, 2^bits], in the dtype of
            `table`.
        bias: bfloat16 [out_features], or None.

    Returns:
        y [tokens, out_features], bfloat16. Products are summed in float32.
    """
    x, table, index_map = x.contiguous(), table.contiguous(), index_map.contiguous()
    if not all(each.is_contiguous() for each in tables[:1]):  # sets may be apart
        tables = tables.contiguous()
    (tokens, columns), (rows, groups, entries) = x.shape, table.shape
    y, sums = x.new_empty(tokens, rows), x.new_empty(tokens, rows, dtype=torch.float32)
    # How far the tables of each token are from those of set -1, in bytes.
    away = np.zeros(tokens, np.int64)
    if sets is not None:
        slots = tables.data_ptr() - table.data_ptr()
        numbers = sets.numpy()
        away = (slots + numbers * (tables.stride(0) * tables.element_size())) * (numbers >= 0)
    parallel = rows * columns * tokens > SERIAL
    shares = numba.get_num_threads() if parallel else 1
    packed, copies = _room(x, groups, tokens, shares)
    bits = entries.bit_length() - 1
    if copies == 1:
        _pack(_key(), bits, 1)(x.data_ptr(), packed.data_ptr(), tokens, groups, columns // groups)
    _dot(_key(), bits, _KINDS[table.dtype], parallel)(
        away,
        index_map.data_ptr(),
        index_map.shape[1],
        table.data_ptr(),
        groups,
        columns // groups,
        rows,
        x.data_ptr(),
        packed.data_ptr(),
        copies,
        packed.shape[1] // tokens * 2,
        0 if bias is None else bias.data_ptr(),
        sums.data_ptr(),
        y.data_ptr(),
        shares,
    )
    return y


def _decode_matrix(x: Tensor, index_map: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W^T + bias, 16 tokens at a time."""
    x, table, index_map = x.contiguous(), table.contiguous(), index_map.contiguous()
    (tokens, columns), (rows, groups, entries) = x.shape, table.shape
    y, sums = x.new_empty(tokens, rows), x.new_empty(tokens, rows, dtype=torch.float32)
    parallel = rows * columns * tokens > SERIAL
    shares = numba.get_num_threads() if parallel else 1
    blocks = -(-tokens // TOKENS)
    packed, copies = _room(x, groups, blocks * TOKENS, shares)
    bits = entries.bit_length() - 1
    if copies == 1:
        _pack(_key(), bits, TOKENS)(
            x.data_ptr(), packed.data_ptr(), tokens, groups, columns // groups
        )
    _matrix(_key(), bits, _KINDS[table.dtype], parallel)(
        index_map.data_ptr(),
        index_map.shape[1],
        table.data_ptr(),
        groups,
        columns // groups,
        rows,
        x.data_ptr(),
        packed.data_ptr(),
        copies,
        packed.shape[1] // blocks * 2,
        0 if bias is None else bias.data_ptr(),
        sums.data_ptr(),
        y.data_ptr(),
        tokens,
        shares,
    )
    return y


def _room(x: Tensor, groups: int, tokens: int, shares: int) -> tuple[Tensor, int]:
    """Return room for packed inputs, [copies, elements], and the number of copies.

    Threads pack few inputs each for itself, as they widen them (see `rows.widened`).
    """
    columns = x.shape[1]
    packed = -(-columns // groups // WIDE_STEP) * WIDE_STEP * groups
    copies = shares if x.shape[0] * columns <= OWN_INPUTS else 1
    return x.new_empty(copies, tokens * packed), copies


def _key() -> str:
    unit = host_unit()
    assert unit is not None
    return unit.key


@functools.cache
def _pack(unit: str, bits: int, size: int) -> Callable[..., None]:
    """Return compiled code that packs inputs in blocks of some tokens. Numba keeps it on disk."""

    def pack_all(x: int, packed: int, tokens: int, groups: int, width: int) -> None:
        stride = 2 * size * groups * ((width + WIDE_STEP - 1) // WIDE_STEP * WIDE_STEP)
        for block in numba.prange((tokens + size - 1) // size):
            first = block * size
            pack(
                x + 2 * first * groups * width, min(size, tokens - first), groups, width,
                packed + block * stride, bits, size
            )  # fmt: skip

    return compiled(pack_all, True)


@functools.cache
def _dot(unit: str, bits: int, kind: str, parallel: bool) -> Callable[..., Any]:
    """Return the compiled products of tokens with tables of their own. Numba keeps them on disk."""

    def multiply(  # type: ignore[no-untyped-def]
        away, codes, code_stride, table, groups, width, rows, x, packed, copies, x_bytes, bias,
        sums, y, shares
    ):  # fmt: skip
        tokens, blocks = len(away), (rows + ROWS - 1) // ROWS
        for share in numba.prange(shares):
            own = packed
            if copies > 1:
                own += share * tokens * x_bytes
            places = np.empty((tokens, FIELDS), np.int64)
            for token in range(tokens):
                line = own + token * x_bytes
                if copies > 1:
                    pack(x + 2 * token * groups * width, 1, groups, width, line, bits, 1)
                places[token, 0] = table + away[token]
                places[token, 1] = line
                places[token, 2] = sums + 4 * token * rows
            whole = tokens - tokens % 4
            for block in range(share * blocks // shares, (share + 1) * blocks // shares):
                first, end = block * ROWS, min(rows, (block + 1) * ROWS)
                for token in range(0, whole, 4):
                    for row in range(first, end, 2):
                        multiply_dot_tile(
                            codes, code_stride, groups, width, row, end - 1,
                            places[token:].ctypes.data, bits, kind, 2, 4
                        )  # fmt: skip
                for token in range(whole, tokens):
                    for row in range(first, end, 4):
                        multiply_dot_tile(
                            codes, code_stride, groups, width, row, end - 1,
                            places[token:].ctypes.data, bits, kind, 4, 1
                        )  # fmt: skip
                finish_rows(sums, bias, y, rows, first, end, tokens, "bfloat16")

    return compiled(multiply, parallel)


@functools.cache
def _matrix(unit: str, bits: int, kind: str, parallel: bool) -> Callable[..., None]:
    """Return the compiled product of many tokens with a kind of sketch. Numba keeps it on disk."""

    def multiply(
        codes: int, code_stride: int, table: int, groups: int, width: int, rows: int, x: int,
        packed: int, copies: int, block_bytes: int, bias: int, sums: int, y: int, tokens: int,
        shares: int
    ) -> None:  # fmt: skip
        blocks, tiles = (tokens + TOKENS - 1) // TOKENS, (rows + ROWS - 1) // ROWS
        for share in numba.prange(shares):
            own = packed
            if copies > 1:
                own += share * blocks * block_bytes
                for block in range(blocks):
                    first = block * TOKENS
                    pack(
                        x + 2 * first * groups * width, min(TOKENS, tokens - first), groups, width,
                        own + block * block_bytes, bits, TOKENS
                    )  # fmt: skip
            configure_tiles()
            for tile in range(share * tiles // shares, (share + 1) * tiles // shares):
                row, end = tile * ROWS, min(rows, (tile + 1) * ROWS)
                block = 0
                while block < blocks:
                    some, token = min(MOST_BLOCKS, blocks - block), block * TOKENS
                    line, target = own + block * block_bytes, sums + 4 * token * rows
                    if some == 1:
                        multiply_matrix(
                            codes, code_stride, table, groups, width, row, end - 1, line,
                            block_bytes, target, 4 * rows, tokens - token, bits, kind, 1
                        )  # fmt: skip
                    elif some == 2:
                        multiply_matrix(
                            codes, code_stride, table, groups, width, row, end - 1, line,
                            block_bytes, target, 4 * rows, tokens - token, bits, kind, 2
                        )  # fmt: skip
                    else:
                        multiply_matrix(
                            codes, code_stride, table, groups, width, row, end - 1, line,
                            block_bytes, target, 4 * rows, tokens - token, bits, kind, 3
                        )  # fmt: skip
                    block += some
                finish_rows(sums, bias, y, rows, row, end, tokens, "bfloat16")
            release_tiles()

    return compiled(multiply, parallel)
