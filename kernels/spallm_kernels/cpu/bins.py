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
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from .llvm import FLOAT, FLOAT_BYTES, element, load, number, store, vector
from .portable import array

Singles = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

#: The fewest columns of a group for which emptying and adding up the bins pays.
LEAST_COLUMNS = 256
_BITS = (2, 3, 4)


def supports(table: Tensor, weight_grad: Tensor) -> bool:
    """Return whether `table_grad` supports such tensors and is faster than the plain loop."""
    _, groups, entries = table.shape
    width = weight_grad.shape[1] // groups
    narrow = weight_grad.dtype != torch.float64
    return (
        narrow and entries.bit_length() - 1 in _BITS and width >= LEAST_COLUMNS and width % 8 == 0
    )


def table_grad(weight_grad: Tensor, index_map: Tensor, table: Tensor) -> Tensor:
    """Return the gradient of the tables, float32 [out_features, groups, 2^bits].

    Args:
        weight_grad: Float [out_features, in_features] for which `supports` returned True.
        index_map: Packed codes, uint8 [out_features, row_bytes].
        table: Tables, float [out_features, groups, 2^bits].
    """
    sums = torch.empty(table.shape)
    gradient = weight_grad.float().contiguous()
    _bin_rows(array(index_map.contiguous()), gradient.numpy(), sums.numpy())
    return sums


@intrinsic(prefer_literal=True)
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


@numba.njit(cache=True, parallel=True, nogil=True, fastmath={"reassoc", "nsz"})
def _bin_rows(packed: Bytes, gradient: Singles, sums: Singles) -> None:
    """Add the gradient of a dense weight up, for every entry of its tables.

    Args:
        packed: Packed codes, uint8 [rows, row_bytes], of 2, 3 or 4 bits.
        gradient: float32 [rows, columns]. The columns of a group are a multiple of 8.
        sums: Filled with the sums, float32 [rows, groups, 2^bits].
    """
    rows, groups, entries = sums.shape
    columns = gradient.shape[1]
    width = columns // groups
    for row in numba.prange(rows):
        if entries == 16:
            _bin_row_4(packed[row], gradient[row], sums[row], width)
        elif entries == 8:
            _bin_row_3(packed[row], gradient[row], sums[row], width)
        else:
            _bin_row_2(packed[row], gradient[row], sums[row], width)


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz"})
def _bin_row_4(stream: Bytes, gradient: Singles, sums: Singles, width: int) -> None:
    bins = np.empty((16, 16, 2), np.float32)
    at, first = bins.ctypes.data, gradient.ctypes.data
    for group in range(sums.shape[0]):
        bins[:] = 0
        start = group * width
        for pair in range(width // 2):
            byte = stream[start // 2 + pair]
            _add(at, np.int64(byte), first + 4 * (start + 2 * pair), 2)
        for code in range(16):
            total = np.float32(0)
            for other in range(16):
                total += bins[other, code, 0] + bins[code, other, 1]
            sums[group, code] = total


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz"})
def _bin_row_3(stream: Bytes, gradient: Singles, sums: Singles, width: int) -> None:
    bins = np.empty((8, 8, 2), np.float32)
    at, first = bins.ctypes.data, gradient.ctypes.data
    for group in range(sums.shape[0]):
        bins[:] = 0
        start = group * width
        for eight in range(width // 8):
            byte = (start + 8 * eight) // 8 * 3
            word = np.int64(stream[byte]) | np.int64(stream[byte + 1]) << 8
            word |= np.int64(stream[byte + 2]) << 16
            for pair in range(4):
                values = first + 4 * (start + 8 * eight + 2 * pair)
                _add(at, word >> 6 * pair & 63, values, 2)
        for code in range(8):
            total = np.float32(0)
            for other in range(8):
                total += bins[other, code, 0] + bins[code, other, 1]
            sums[group, code] = total


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz"})
def _bin_row_2(stream: Bytes, gradient: Singles, sums: Singles, width: int) -> None:
    bins = np.empty((4, 4, 4, 4, 4), np.float32)
    at, first = bins.ctypes.data, gradient.ctypes.data
    for group in range(sums.shape[0]):
        bins[:] = 0
        start = group * width
        for four in range(width // 4):
            byte = stream[start // 4 + four]
            _add(at, np.int64(byte), first + 4 * (start + 4 * four), 4)
        for code in range(4):
            total = np.float32(0)
            for a in range(4):
                for b in range(4):
                    for c in range(4):
                        total += bins[a, b, c, code, 0] + bins[a, b, code, c, 1]
                        total += bins[a, code, b, c, 2] + bins[code, a, b, c, 3]
            sums[group, code] = total
