"""Add the gradient of a dense weight up by codes, several codes at a time.

A byte of 4-bit codes holds two codes. Their two gradients are one vector of two numbers, which is
added to the bin of the byte, one of 256. So an addition serves two weights, and it seldom has to
wait for an earlier one to the same bin. At the end of a group, bins with the same first code are
added up, and bins with the same second code. Other widths work alike:

    bits  codes at a time  bins
    4     2                256
    3     2                 64
    2     4                256
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba import types
from torch import Tensor

from .llvm import FLOAT, FLOAT_BYTES, element, load, native, store, vector
from .portable import array

Singles = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

#: The fewest columns of a group for which emptying and adding up the bins pays.
LEAST_COLUMNS = 256
#: Columns whose gradients lie together. The columns of a group are a multiple of it.
PIECE = 64
_BITS = (2, 3, 4)


def supports(table: Tensor, weight_grad: Tensor) -> bool:
    """Return whether `table_grad` supports such tensors and is faster than the plain loop."""
    _, groups, entries = table.shape
    width = weight_grad.shape[1] // groups
    narrow = weight_grad.dtype != torch.float64
    return (
        narrow
        and entries.bit_length() - 1 in _BITS
        and width >= LEAST_COLUMNS
        and width % PIECE == 0
    )


def table_grad(weight_grad: Tensor, index_map: Tensor, table: Tensor) -> Tensor:
    """Return the gradient of the tables, float32 [out_features, groups, 2^bits].

    Args:
        weight_grad: Float [out_features, in_features] for which `supports` returned True.
        index_map: Packed codes, uint8 [out_features, row_bytes].
        table: Tables, float [out_features, groups, 2^bits].
    """
    gradient = weight_grad.float().contiguous()
    sums = gradient.new_empty(table.shape)
    _bin_rows(array(index_map.contiguous()), gradient.numpy(), sums.numpy())
    return sums


@native
def _add(context, bins, index, values, count):  # type: ignore[no-untyped-def]
    """Add `count` float32 numbers at the address `values` to those of a bin, as one vector."""
    lanes = count.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, index, values, _ = arguments
        numbers = vector(FLOAT, lanes)
        address = element(builder, first, index, FLOAT_BYTES * lanes)
        total = builder.fadd(load(builder, address, numbers), load(builder, values, numbers))
        store(builder, total, address)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, count), generate


@numba.njit(cache=True, parallel=True, nogil=True)
def _bin_rows(packed: Bytes, gradient: Singles, sums: Singles) -> None:
    groups, width = sums.shape[1], gradient.shape[1] // sums.shape[1]
    for row in numba.prange(sums.shape[0]):
        for group in range(groups):
            start = group * width
            pieces = gradient.ctypes.data + 4 * (row * gradient.shape[1] + start)
            bin_group(packed[row], start, width, pieces, 4 * PIECE, sums[row, group])


@numba.njit(cache=True, nogil=True)
def bin_group(
    stream: Bytes, start: int, width: int, pieces: int, stride: int, sums: Singles
) -> None:
    """Add the gradients of a group of a row up, by codes.

    Args:
        stream: Packed codes of the row, uint8 [row_bytes].
        start: Number of the group's first column.
        width: Columns of the group, a multiple of 64.
        pieces: Address of the gradients, float32, in pieces of 64.
        stride: Bytes from one piece to the next.
        sums: Filled with the sums, float32 [2^bits].
    """
    if sums.shape[0] == 16:
        _bin_4(stream, start, width, pieces, stride, sums)
    elif sums.shape[0] == 8:
        _bin_3(stream, start, width, pieces, stride, sums)
    else:
        _bin_2(stream, start, width, pieces, stride, sums)


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz"})
def _bin_4(stream: Bytes, start: int, width: int, pieces: int, stride: int, sums: Singles) -> None:
    bins = np.zeros((16, 16, 2), np.float32)
    address, byte = bins.ctypes.data, start // 2
    for piece in range(width // PIECE):
        for pair in range(PIECE // 2):
            _add(address, np.int64(stream[byte]), pieces + piece * stride + 8 * pair, 2)
            byte += 1
    for code in range(16):
        total = np.float32(0)
        for other in range(16):
            total += bins[other, code, 0] + bins[code, other, 1]
        sums[code] = total


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz"})
def _bin_3(stream: Bytes, start: int, width: int, pieces: int, stride: int, sums: Singles) -> None:
    bins = np.zeros((8, 8, 2), np.float32)
    address, byte = bins.ctypes.data, start // 8 * 3
    for piece in range(width // PIECE):
        for eight in range(PIECE // 8):
            word = np.int64(stream[byte]) | np.int64(stream[byte + 1]) << 8
            word |= np.int64(stream[byte + 2]) << 16
            byte += 3
            for pair in range(4):
                values = pieces + piece * stride + 4 * (8 * eight + 2 * pair)
                _add(address, word >> 6 * pair & 63, values, 2)
    for code in range(8):
        total = np.float32(0)
        for other in range(8):
            total += bins[other, code, 0] + bins[code, other, 1]
        sums[code] = total


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz"})
def _bin_2(stream: Bytes, start: int, width: int, pieces: int, stride: int, sums: Singles) -> None:
    bins = np.zeros((4, 4, 4, 4, 4), np.float32)
    address, byte = bins.ctypes.data, start // 4
    for piece in range(width // PIECE):
        for four in range(PIECE // 4):
            _add(address, np.int64(stream[byte]), pieces + piece * stride + 16 * four, 4)
            byte += 1
    for code in range(4):
        total = np.float32(0)
        for a in range(4):
            for b in range(4):
                for c in range(4):
                    total += bins[a, b, c, code, 0] + bins[a, b, code, c, 1]
                    total += bins[a, code, b, c, 2] + bins[code, a, b, c, 3]
        sums[code] = total
