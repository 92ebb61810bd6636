"""Compute the sketched linear layer in plain numba, a row of codes at a time, in the cache.

It serves every number of bits, every dtype and every processor. Values that are only moved are
moved as integers of their size, so bfloat16 works too.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .codes import row_of_codes

_INTEGER_OF_BYTES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
Array = npt.NDArray[Any]


def decode(x: Tensor, index_map: Tensor, table: Tensor, hash_seed: int | None) -> Tensor:
    """Compute x W^T with one dense row at a time.

    Args:
        x: float32 [tokens, in_features].
        index_map: Packed codes, uint8 [out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables, float [out_features, groups, 2^bits].
        hash_seed: Seed of the `hash` mapping; None if codes are stored.

    Returns:
        float32 [tokens, out_features].
    """
    y = x.new_empty(x.shape[0], table.shape[0])
    codes = _codes(index_map, hash_seed, 0)
    _decode(*codes, array(table.float().contiguous()), array(x.contiguous()), y.numpy())
    return y


def dequantize(
    index_map: Tensor, table: Tensor, in_features: int, hash_seed: int | None, first_row: int
) -> Tensor:
    """Return the dense weight of a sketch. `linear.dequantize` explains the arguments."""
    weight = table.new_empty(table.shape[0], in_features)
    as_integers = _INTEGER_OF_BYTES[table.element_size()]
    _look_up(
        *_codes(index_map, hash_seed, first_row),
        array(table.contiguous().view(as_integers)),
        weight.view(as_integers).numpy(),
    )
    return weight


def table_grad(
    weight_grad: Tensor,
    index_map: Tensor,
    table: Tensor,
    hash_seed: int | None,
    first_row: int,
) -> Tensor:
    """Return the gradient of the tables. `linear.table_grad` explains the arguments."""
    wide = torch.promote_types(weight_grad.dtype, torch.float32)
    sums = weight_grad.new_empty(table.shape, dtype=wide)
    gradient = weight_grad.to(wide).contiguous().numpy()
    _bin(*_codes(index_map, hash_seed, first_row), gradient, sums.numpy())
    return sums


def _codes(
    index_map: Tensor, hash_seed: int | None, first_row: int
) -> tuple[Array, np.uint32, np.uint32]:
    """Return the arguments from which the loops below read codes."""
    packed = index_map if hash_seed is None else index_map[:, :0]
    return array(packed.contiguous()), np.uint32(hash_seed or 0), np.uint32(first_row)


def array(parameter: Tensor) -> Array:
    """Return a tensor as an array.

    `Tensor.numpy` would make its memory impossible to free for good, and FSDP2 frees the memory of
    what it has gathered.
    """
    return np.from_dlpack(parameter.detach())


@numba.njit(cache=True, nogil=True, inline="always")
def _bits_of(table: Array) -> int:
    bits = 0
    while 1 << bits < table.shape[2]:
        bits += 1
    return bits


@numba.njit(cache=True, parallel=True, nogil=True)
def _look_up(
    packed: Array, seed: np.uint32, first_row: np.uint32, table: Array, weight: Array
) -> None:
    bits, width = _bits_of(table), weight.shape[1] // table.shape[1]
    for row in numba.prange(weight.shape[0]):
        codes = np.empty(weight.shape[1], np.uint8)
        row_of_codes(packed, row, bits, seed, first_row, codes)
        for group in range(table.shape[1]):
            entries = table[row, group]
            for column in range(group * width, (group + 1) * width):
                weight[row, column] = entries[codes[column]]


# Sums may be taken in any order; otherwise the loop over columns adds one product at a time.
@numba.njit(cache=True, parallel=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _decode(
    packed: Array, seed: np.uint32, first_row: np.uint32, table: Array, x: Array, y: Array
) -> None:
    columns = x.shape[1]
    bits, width = _bits_of(table), columns // table.shape[1]
    for row in numba.prange(table.shape[0]):
        codes = np.empty(columns, np.uint8)
        weight = np.empty(columns, np.float32)
        row_of_codes(packed, row, bits, seed, first_row, codes)
        for group in range(table.shape[1]):
            entries = table[row, group]
            for column in range(group * width, (group + 1) * width):
                weight[column] = entries[codes[column]]
        for token in range(x.shape[0]):
            line, total = x[token], np.float32(0)
            for column in range(columns):
                total += weight[column] * line[column]
            y[token, row] = total


@numba.njit(cache=True, parallel=True, nogil=True)
def _bin(
    packed: Array, seed: np.uint32, first_row: np.uint32, gradient: Array, sums: Array
) -> None:
    bits, width = _bits_of(sums), gradient.shape[1] // sums.shape[1]
    for row in numba.prange(sums.shape[0]):
        codes = np.empty(gradient.shape[1], np.uint8)
        row_of_codes(packed, row, bits, seed, first_row, codes)
        # Four sums per code: an addition need not wait for the previous one to the same code.
        partial = np.empty((4, sums.shape[2]), sums.dtype)
        for group in range(sums.shape[1]):
            partial[:] = 0
            for column in range(group * width, (group + 1) * width):
                partial[column & 3, codes[column]] += gradient[row, column]
            for entry in range(sums.shape[2]):
                sums[row, group, entry] = (partial[0, entry] + partial[1, entry]) + (
                    partial[2, entry] + partial[3, entry]
                )
