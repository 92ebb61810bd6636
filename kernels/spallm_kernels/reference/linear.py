"""State the sketched linear layer in plain torch, as short and readable as possible.

    W[o, i] = table[o, i // (in_features / groups), code[o, i]]        y = x W^T

It runs on any device in any float dtype. It is not optimised, because every other backend is
compared with it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(index_map: Tensor, bits: int, in_features: int) -> Tensor:
    """Unpack the codes of an index map.

    Code i of a row is bits [i * bits, (i + 1) * bits) of its little-endian bit stream.

    Args:
        index_map: Packed codes, uint8 [out_features, row_bytes].
        bits: Bits of a code.
        in_features: Codes per row.

    Returns:
        Codes, int64 [out_features, in_features].
    """
    first = torch.arange(in_features, device=index_map.device) * bits
    low = index_map[:, first // 8].long()
    # If a code ends in its first byte, that byte is read twice; the mask removes the extra bits.
    high = index_map[:, (first + bits - 1) // 8].long()
    return ((low | high << 8) >> first % 8) & ((1 << bits) - 1)


def hash_codes(
    rows: int, in_features: int, bits: int, seed: int, first_row: int, device: torch.device
) -> Tensor:
    """Return codes of the `hash` mapping, int64 [rows, in_features] (see `hashing.py`)."""
    numbers = torch.arange(first_row, first_row + rows, device=device)
    return hash_codes_of_rows(numbers, in_features, bits, seed)


def hash_codes_of_rows(numbers: Tensor, in_features: int, bits: int, seed: int) -> Tensor:
    """Return codes of the `hash` mapping for any rows, int64 [rows, in_features].

    Args:
        numbers: Numbers of the rows in the module, int64 [rows].
        in_features: Codes per row.
        bits: Bits of a code.
        seed: Seed of the hash.
    """

    def mix(x: Tensor) -> Tensor:
        x = x ^ x >> 16
        x = x * 0x21F0AAAD & 0xFFFFFFFF
        x = x ^ x >> 15
        x = x * 0xD35A2D97 & 0xFFFFFFFF
        return x ^ x >> 15

    keys = mix(numbers ^ mix(torch.tensor(seed, device=numbers.device)))
    columns = torch.arange(in_features, device=numbers.device)
    return mix(columns ^ keys[:, None]) & ((1 << bits) - 1)


def codes_of(
    index_map: Tensor, table: Tensor, in_features: int, hash_seed: int | None, first_row: int
) -> Tensor:
    """Return codes, int64 [out_features, in_features]: unpacked, or hashed if there is a seed."""
    bits = table.shape[-1].bit_length() - 1
    if hash_seed is None:
        return unpack(index_map, bits, in_features)
    return hash_codes(table.shape[0], in_features, bits, hash_seed, first_row, table.device)


def dequantize(
    index_map: Tensor,
    table: Tensor,
    in_features: int,
    *,
    hash_seed: int | None = None,
    first_row: int = 0,
) -> Tensor:
    """Return the dense weight of a sketch.

    Args:
        index_map: Packed codes, uint8 [out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables, float [out_features, groups, 2^bits].
        in_features: Columns of the weight.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        first_row: Number of the first row in the module, for the hash.

    Returns:
        The weight [out_features, in_features], in the dtype of the table.
    """
    codes = codes_of(index_map, table, in_features, hash_seed, first_row)
    rows, groups, _ = table.shape
    grouped = codes.view(rows, groups, in_features // groups)
    return table.gather(2, grouped).view(rows, in_features)


def table_grad(
    weight_grad: Tensor,
    index_map: Tensor,
    table: Tensor,
    *,
    hash_seed: int | None = None,
    first_row: int = 0,
) -> Tensor:
    """Return the gradient of the tables, given the gradient of the dense weight.

    Args:
        weight_grad: Float [out_features, in_features].
        index_map: Packed codes, uint8 [out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables, float [out_features, groups, 2^bits].
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        first_row: Number of the first row in the module, for the hash.

    Returns:
        The gradient in the shape of the table: for each entry the sum over the weights that use it,
        in float32 or wider.
    """
    rows, groups, _ = table.shape
    in_features = weight_grad.shape[1]
    codes = codes_of(index_map, table, in_features, hash_seed, first_row)
    wide = torch.promote_types(weight_grad.dtype, torch.float32)
    sums = torch.zeros(table.shape, dtype=wide, device=table.device)
    shape = (rows, groups, in_features // groups)
    return sums.scatter_add_(2, codes.view(shape), weight_grad.to(wide).view(shape))
