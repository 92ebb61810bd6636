"""Multiply bfloat16 inputs with a sketched weight in the tile registers of AMX.

`matrix_tiles.py` has the instructions, `packing.py` the order of the inputs. Rows are shared among
the threads. The instructions take subnormal numbers for 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numba
import torch
from torch import Tensor

from . import vectorized
from .bfloat16_steps import WIDE_STEP
from .matrix_tiles import MOST_BLOCKS, ROWS, configure_tiles, multiply_matrix, release_tiles
from .packing import TOKENS, pack
from .rows import OWN_INPUTS, compiled, finish_rows
from .vector_units import host_unit

#: The fewest tokens for which tiles are faster than vector registers.
_LEAST_TOKENS = 3
_KINDS = {torch.bfloat16: "bfloat16", torch.float32: "rounded_bfloat16"}


def supports(x: Tensor, table: Tensor, hash_seed: int | None) -> bool:
    """Return whether this machine multiplies such tensors in tile registers, and is faster so.

    Args:
        x: Inputs, float [tokens, in_features].
        table: Tables, float [out_features, groups, 2^bits].
        hash_seed: Seed of the `hash` mapping; None if codes are stored.
    """
    unit = host_unit()
    return (
        unit is not None
        and unit.has_matrix
        and x.dtype == torch.bfloat16
        and x.shape[0] >= _LEAST_TOKENS
        and table.dtype in _KINDS
        and hash_seed is None
        and vectorized.supports(table, x.shape[1], hash_seed)
    )


def decode(x: Tensor, index_map: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + bias for tensors for which `supports` returned True.

    Args:
        x: bfloat16 [tokens, in_features].
        index_map: Packed codes, uint8 [out_features, row_bytes].
        table: Tables, bfloat16 or float32 [out_features, groups, 2^bits], rounded to bfloat16.
        bias: Float [out_features], rounded to bfloat16, or None.

    Returns:
        y [tokens, out_features], bfloat16. Products are summed in float32.
    """
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    x, table, index_map = x.contiguous(), table.contiguous(), index_map.contiguous()
    (tokens, columns), (rows, groups, entries) = x.shape, table.shape
    y, sums = x.new_empty(tokens, rows), x.new_empty(tokens, rows, dtype=torch.float32)
    parallel = rows * columns * tokens > vectorized.SERIAL
    shares = numba.get_num_threads() if parallel else 1
    # Threads pack few inputs each for itself, as they widen them (see `rows.widened`).
    copies = shares if x.numel() <= OWN_INPUTS else 1
    width, blocks, bits = columns // groups, -(-tokens // TOKENS), entries.bit_length() - 1
    block_elements = TOKENS * groups * (-(-width // WIDE_STEP) * WIDE_STEP)
    packed = x.new_empty(copies, blocks, block_elements)
    unit = host_unit()
    assert unit is not None
    if copies == 1:
        pack_all = _pack(unit.key, bits)
        pack_all(x.data_ptr(), packed.data_ptr(), 2 * block_elements, tokens, groups, width)
    kernel = _product(unit.key, bits, _KINDS[table.dtype], parallel)
    kernel(
        index_map.data_ptr(),
        index_map.shape[1],
        table.data_ptr(),
        groups,
        width,
        rows,
        x.data_ptr(),
        packed.data_ptr(),
        copies,
        2 * block_elements,
        0 if bias is None else bias.data_ptr(),
        sums.data_ptr(),
        y.data_ptr(),
        tokens,
        shares,
    )
    return y


@functools.cache
def _pack(unit: str, bits: int) -> Callable[..., None]:
    """Return compiled code that packs inputs for all threads. Numba keeps it on disk."""

    def pack_all(
        x: int, packed: int, block_bytes: int, tokens: int, groups: int, width: int
    ) -> None:
        for block in numba.prange((tokens + TOKENS - 1) // TOKENS):
            first = block * TOKENS
            pack(
                x + 2 * first * groups * width, min(TOKENS, tokens - first), groups, width,
                packed + block * block_bytes, bits
            )  # fmt: skip

    return compiled(pack_all, True)


@functools.cache
def _product(unit: str, bits: int, kind: str, parallel: bool) -> Callable[..., None]:
    """Return the compiled product for a kind of sketch. Numba keeps it on disk."""

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
                        own + block * block_bytes, bits
                    )  # fmt: skip
            configure_tiles()
            for tile in range(share * tiles // shares, (share + 1) * tiles // shares):
                row, end = tile * ROWS, min(rows, (tile + 1) * ROWS)
                block = 0
                while block < blocks:
                    some = min(MOST_BLOCKS, blocks - block)
                    first, line = block * TOKENS, own + block * block_bytes
                    # The number of blocks is a constant of the instructions.
                    if some == 1:
                        multiply_matrix(
                            codes, code_stride, table, groups, width, row, end - 1, line,
                            block_bytes, sums + 4 * first * rows, 4 * rows, tokens - first,
                            bits, kind, 1
                        )  # fmt: skip
                    elif some == 2:
                        multiply_matrix(
                            codes, code_stride, table, groups, width, row, end - 1, line,
                            block_bytes, sums + 4 * first * rows, 4 * rows, tokens - first,
                            bits, kind, 2
                        )  # fmt: skip
                    else:
                        multiply_matrix(
                            codes, code_stride, table, groups, width, row, end - 1, line,
                            block_bytes, sums + 4 * first * rows, 4 * rows, tokens - first,
                            bits, kind, 3
                        )  # fmt: skip
                    block += some
                finish_rows(sums, bias, y, rows, row, end, tokens, "bfloat16")
            release_tiles()

    return compiled(multiply, parallel)
