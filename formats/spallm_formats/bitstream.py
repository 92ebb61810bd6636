"""Pack and unpack rows of codes in numba. `packing.py` defines the format and checks the arguments.

This is a separate module so that reading headers does not import numba. A 64-bit accumulator holds
at most 7 waiting bits and one code of 8, so it never overflows.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@numba.njit(cache=True, parallel=True, nogil=True)
def pack_rows(codes: Bytes, bits: int, packed: Bytes) -> None:
    """Fill packed [rows, row_bytes], which must be zero, from codes [rows, in_features]."""
    for row in numba.prange(codes.shape[0]):
        waiting = np.uint64(0)
        filled = np.uint64(0)
        at = 0
        for column in range(codes.shape[1]):
            waiting |= np.uint64(codes[row, column]) << filled
            filled += np.uint64(bits)
            if filled >= np.uint64(8):
                packed[row, at] = np.uint8(waiting & np.uint64(0xFF))
                waiting >>= np.uint64(8)
                filled -= np.uint64(8)
                at += 1
        if filled:
            packed[row, at] = np.uint8(waiting)


@numba.njit(cache=True, parallel=True, nogil=True)
def unpack_rows(packed: Bytes, bits: int, codes: Bytes) -> None:
    """Fill codes [rows, in_features] from packed [rows, row_bytes]."""
    mask = np.uint64((1 << bits) - 1)
    for row in numba.prange(packed.shape[0]):
        waiting = np.uint64(0)
        filled = np.uint64(0)
        at = 0
        for column in range(codes.shape[1]):
            if filled < np.uint64(bits):
                waiting |= np.uint64(packed[row, at]) << filled
                filled += np.uint64(8)
                at += 1
            codes[row, column] = np.uint8(waiting & mask)
            waiting >>= np.uint64(bits)
            filled -= np.uint64(bits)
