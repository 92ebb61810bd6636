"""Compute with a sketched weight in vector registers (see `tiles.py`), in parallel over rows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numba
import torch
from torch import Tensor

from .rows import ROWS, compiled, finish_rows, multiply_rows, own_inputs, widen_once, widened
from .tiles import look_up_rest, look_up_steps
from .vector_units import host_unit

#: Kinds of inputs, and of table entries that a product converts to float32 in registers.
KINDS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
#: Kinds of float32 entries that are rounded to the dtype of the inputs in registers. A copy of the
#: tables of 16 sets would take a tenth of the time of the products.
_ROUNDED = {torch.float16: "rounded_float16", torch.bfloat16: "rounded_bfloat16"}
_BITS = (2, 3, 4)
#: Multiplications below which a second thread costs more time than it saves.
SERIAL = 1 << 18


def supports(table: Tensor, in_features: int, hash_seed: int | None) -> bool:
    """Return whether this machine has vector instructions for such a sketch.

    Args:
        table: Tables, any float [out_features, groups, 2^bits].
        in_features: Columns of the weight.
        hash_seed: Seed of the `hash` mapping; None if codes are stored.
    """
    _, groups, entries = table.shape
    bits = entries.bit_length() - 1
    if host_unit() is None or bits not in _BITS or table.dtype not in KINDS:
        return False
    return groups == 1 or hash_seed is not None or in_features // groups * bits % 8 == 0


def kind_of(table: torch.dtype, x: torch.dtype) -> str | None:
    """Return as what entries of a dtype are read for inputs of a dtype; None if they cannot be.

    Args:
        table: Dtype of the tables.
        x: Dtype of the inputs. Entries are rounded to it if it has 16 bits.
    """
    if x in (torch.float32, table):
        return KINDS.get(table)
    return _ROUNDED[x] if table == torch.float32 else None


def decode(
    x: Tensor,
    index_map: Tensor,
    table: Tensor,
    hash_seed: int | None,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute x W^T + bias, with weights that exist in registers only.

    Args:
        x: float32, float16 or bfloat16 [tokens, in_features].
        index_map: Packed codes, uint8 [out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables, float [out_features, groups, 2^bits] for which `supports` returned True.
        hash_seed: Seed of the `hash` mapping; None if codes are stored.
        bias: Float [out_features], rounded to the dtype of x, or None.

    Returns:
        y [tokens, out_features] in the dtype of x. Products are summed in float32.
    """
    kind = kind_of(table.dtype, x.dtype)
    if kind is None:
        table, kind = table.to(x.dtype), KINDS[x.dtype]
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    x, table, index_map = x.contiguous(), table.contiguous(), index_map.contiguous()
    (tokens, columns), (rows, groups, entries) = x.shape, table.shape
    # Not torch's default dtype and device, which a caller may have set.
    y = x.new_empty(tokens, rows)
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
        index_map.data_ptr(),
        index_map.shape[1],
        table.data_ptr(),
        groups,
        columns // groups,
        hash_seed or 0,
        rows,
        x.data_ptr(),
        wide.data_ptr(),
        copies,
        0 if bias is None else bias.data_ptr(),
        sums.data_ptr(),
        y.data_ptr(),
        tokens,
        shares,
    )
    return y


def dequantize(
    index_map: Tensor, table: Tensor, in_features: int, hash_seed: int | None, first_row: int
) -> Tensor:
    """Return the dense weight of a sketch for which `supports` returned True.

    Args:
        index_map: Packed codes, uint8 [out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables, float [out_features, groups, 2^bits].
        in_features: Columns of the weight.
        hash_seed: Seed of the `hash` mapping; None if codes are stored.
        first_row: Number of the first row in the module, for the hash.

    Returns:
        The weight [out_features, in_features], in the dtype of the table.
    """
    index_map, table = index_map.contiguous(), table.contiguous()
    rows, groups, entries = table.shape
    weight = table.new_empty(rows, in_features)
    unit = host_unit()
    assert unit is not None
    kernel = _look_up(
        unit.key,
        entries.bit_length() - 1,
        "float32" if table.element_size() == 4 else "raw16",
        int(hash_seed is not None),
        rows * in_features > SERIAL,
    )
    # Row 0 of the module may lie before the first byte of the tensors. It is not read.
    row_bytes, table_bytes = index_map.shape[1], groups * entries * table.element_size()
    kernel(
        index_map.data_ptr() - first_row * row_bytes,
        row_bytes,
        table.data_ptr() - first_row * table_bytes,
        groups,
        in_features // groups,
        hash_seed or 0,
        first_row,
        rows,
        weight.data_ptr(),
        in_features * weight.element_size(),
    )
    return weight


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
    """Return the compiled product for a kind of sketch. Numba keeps it on disk."""
    high, middle, low, tall, many = tiles

    def multiply(
        codes: int, code_stride: int, table: int, groups: int, width: int, seed: int, rows: int,
        x: int, wide: int, copies: int, bias: int, sums: int, y: int, tokens: int, shares: int
    ) -> None:  # fmt: skip
        count, blocks = tokens * groups * width, (rows + ROWS - 1) // ROWS
        widen_once(x, wide, count, copies, x_kind)
        for share in numba.prange(shares):
            own = own_inputs(x, wide, count, copies, share, x_kind)
            for block in range(share * blocks // shares, (share + 1) * blocks // shares):
                first, end = block * ROWS, min(rows, (block + 1) * ROWS)
                multiply_rows(
                    codes, code_stride, table, groups, width, seed, first, end, own, sums, 4 * rows,
                    tokens, unit, high, middle, low, tall, many, bits, kind, hashed
                )  # fmt: skip
                finish_rows(sums, bias, y, rows, first, end, tokens, x_kind)

    return compiled(multiply, parallel)


@functools.cache
def _look_up(unit: str, bits: int, kind: str, hashed: int, parallel: bool) -> Callable[..., None]:
    """Return the compiled lookup for a kind of sketch. Numba keeps it on disk."""

    def look_up(
        codes: int, code_stride: int, table: int, groups: int, width: int, seed: int,
        first_row: int, rows: int, weight: int, weight_stride: int
    ) -> None:  # fmt: skip
        size = weight_stride // (groups * width)
        for index in numba.prange(rows):
            row = first_row + index
            for group in range(groups):
                target = weight + index * weight_stride + group * width * size
                look_up_steps(
                    codes, code_stride, table, groups, width, seed, row, group, 0, width // 16,
                    target, unit, bits, kind, hashed
                )  # fmt: skip
                if width % 16:
                    look_up_rest(
                        codes, code_stride, table, groups, width, seed, row, group,
                        target + width // 16 * 16 * size, unit, bits, kind, hashed
                    )  # fmt: skip

    return compiled(look_up, parallel)
