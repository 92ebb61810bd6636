"""Launch the kernels of the sketched linear layer on a GPU.

The functions have the signatures and meanings of those in `reference/linear.py`. Tensors on the CPU
are accepted under Triton's interpreter. The interpreter has no byte permutes and no bfloat16
arithmetic, so there tables are looked up by `tl.gather` in float32. `portable` calls use no byte
permutes either (see `portable.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import choose_tile, launch_decode
from .dequantize import dequantize_any_kernel, dequantize_units_kernel
from .device import on
from .launching import HALVES, INTERPRETED, OPTIONS, packed_words, words_per_row
from .ptx import UNIT_CODES, UNIT_WORDS
from .table_grad import table_grad_kernel
from .tiles import (
    ALIGNMENT,
    DECODE_TOKENS,
    DEQUANTIZE_ANY,
    DEQUANTIZE_UNITS,
    HASHED_DECODE_TOKENS,
    TABLE_GRAD,
    BlockTile,
    DecodeTile,
)

_INTEGER_OF_BYTES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def can_decode(x: Tensor, table: Tensor) -> bool:
    """Return whether `decode` supports the tensors.

    It needs few tokens in 16 bits, 2 to 4 bits per code, and groups of whole units.
    """
    (tokens, columns), groups = x.shape, table.shape[1]
    return (
        0 < tokens <= DECODE_TOKENS
        and x.dtype in HALVES
        and table.shape[-1].bit_length() - 1 in UNIT_CODES
        and columns // groups % ALIGNMENT == 0
    )


def decode_tokens(x: Tensor, table: Tensor, *, hashed: bool) -> float:
    """Return the most tokens for which `decode` is the faster path."""
    return HASHED_DECODE_TOKENS if hashed else DECODE_TOKENS


def decode(
    x: Tensor,
    index_map: Tensor,
    table: Tensor,
    bias: Tensor | None = None,
    *,
    hash_seed: int | None = None,
    tile: DecodeTile | None = None,
    portable: bool = False,
) -> Tensor:
    """Compute y = x W^T + bias without a dense weight.

    Args:
        x: float16 or bfloat16 [tokens, in_features], at most DECODE_TOKENS tokens (see `tiles.py`).
        index_map: Packed codes, uint8 [out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables, any float [out_features, groups, 2^bits], rounded to the dtype of x.
        bias: Float [out_features], or None.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        tile: Share of one program; by default the measured one.
        portable: Whether to look weights up by `tl.gather`, without assembly.

    Returns:
        y [tokens, out_features], in the dtype of x.
    """
    (tokens, columns), (rows, groups, entries) = x.shape, table.shape
    if tile is None:
        sizes = entries.bit_length() - 1, tokens, columns, columns // groups
        tile = choose_tile(*sizes, index_map, hashed=hash_seed is not None, portable=portable)
    operands = x, index_map, table, bias, rows
    return launch_decode(*operands, hash_seed, tile, one=tokens == 1, portable=portable)


def dequantize(
    index_map: Tensor,
    table: Tensor,
    in_features: int,
    *,
    hash_seed: int | None = None,
    first_row: int = 0,
    tile: BlockTile | None = None,
    portable: bool = False,
) -> Tensor:
    """Return the dense weight of a sketch.

    Args:
        index_map: Packed codes, uint8 [out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables, float [out_features, groups, 2^bits].
        in_features: Columns of the weight.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        first_row: Number of the first row in the module, for the hash.
        tile: Share of one program; by default the measured one.
        portable: Whether to read every weight from the table in memory, without assembly.

    Returns:
        The weight [out_features, in_features], in the dtype of the table.
    """
    rows, groups, entries = table.shape
    bits, width = entries.bit_length() - 1, in_features // groups
    weight = torch.empty(rows, in_features, dtype=table.dtype, device=table.device)
    words, row_words = packed_words(index_map), words_per_row(index_map)
    sizes = (rows, in_features, row_words, width, first_row, hash_seed or 0)
    hashed = hash_seed is not None
    in_units = bits in UNIT_CODES and table.dtype in HALVES and width % ALIGNMENT == 0
    with on(table.device):
        if in_units and not portable:
            tile = tile or DEQUANTIZE_UNITS
            dequantize_units_kernel[(triton.cdiv(rows, tile.rows), groups)](
                words,
                table.contiguous(),
                weight,
                *sizes,
                BITS=bits,
                CODES=UNIT_CODES[bits],
                WORDS=UNIT_WORDS[bits],
                HASHED=hashed,
                ASM=not INTERPRETED,
                ROWS=tile.rows,
                UNITS=tile.columns // UNIT_CODES[bits],
                num_warps=tile.warps,
                **OPTIONS,
            )
        else:
            integers = _INTEGER_OF_BYTES[table.element_size()]
            tile = tile or DEQUANTIZE_ANY
            grid = (triton.cdiv(rows, tile.rows), triton.cdiv(in_features, tile.columns))
            dequantize_any_kernel[grid](
                words,
                table.contiguous().view(integers),
                weight.view(integers),
                *sizes,
                BITS=bits,
                HASHED=hashed,
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                num_warps=tile.warps,
                **OPTIONS,
            )
    return weight


def table_grad(
    weight_grad: Tensor,
    index_map: Tensor,
    table: Tensor,
    *,
    hash_seed: int | None = None,
    first_row: int = 0,
    tile: BlockTile = TABLE_GRAD,
) -> Tensor:
    """Return the gradient of the tables, given the gradient of the dense weight.

    Args:
        weight_grad: Float [out_features, in_features].
        index_map: Packed codes, uint8 [out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables, float [out_features, groups, 2^bits].
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        first_row: Number of the first row in the module, for the hash.
        tile: Share of one program; by default the measured one.

    Returns:
        The gradient in the shape of the table: for each entry the sum over the weights that use it,
        in float32 or wider.
    """
    rows, groups, entries = table.shape
    columns = weight_grad.shape[1]
    wide = torch.promote_types(weight_grad.dtype, torch.float32)
    sums = torch.empty(table.shape, dtype=wide, device=table.device)
    words, row_words = packed_words(index_map), words_per_row(index_map)
    with on(table.device):
        table_grad_kernel[(triton.cdiv(rows, tile.rows), groups)](
            words,
            weight_grad.contiguous(),
            sums,
            rows,
            columns,
            row_words,
            columns // groups,
            first_row,
            hash_seed or 0,
            BITS=entries.bit_length() - 1,
            HASHED=hash_seed is not None,
            WIDE=tl.float64 if wide == torch.float64 else tl.float32,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
            **OPTIONS,
        )
    return sums
