"""Produce a row of codes on the CPU: unpacked from its bytes, or hashed from row, column and seed.

A whole row is unpacked into the cache first, because the compiler can do that in vector registers.
Looking up is then one load per weight.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from .hashing import mix

Array = npt.NDArray[Any]


@numba.njit(cache=True, nogil=True)
def row_of_codes(
    packed: Array, row: int, bits: int, seed: np.uint32, first_row: np.uint32, codes: Array
) -> None:
    """Fill `codes`, uint8 [columns], with the codes of a row.

    packed is uint8 [rows, row_bytes], or [rows, 0] for the `hash` mapping: then the codes are
    hashed, and row 0 is row `first_row` of the module.
    """
    if packed.shape[1] == 0:
        key = mix(np.uint32(first_row + np.uint32(row)) ^ mix(seed))
        mask = np.uint32((1 << bits) - 1)
        for column in range(codes.shape[0]):
            codes[column] = mix(np.uint32(column) ^ key) & mask
        return
    stream = packed[row]
    whole = 0  # codes already read by the loops over whole bytes
    if bits == 4:
        whole = codes.shape[0] & ~1
        for pair in range(whole >> 1):
            byte = stream[pair]
            codes[2 * pair] = byte & 15
            codes[2 * pair + 1] = byte >> 4
    elif bits == 3:
        whole = codes.shape[0] & ~7
        for eight in range(whole >> 3):
            word = np.uint32(stream[3 * eight])
            word |= np.uint32(stream[3 * eight + 1]) << np.uint32(8)
            word |= np.uint32(stream[3 * eight + 2]) << np.uint32(16)
            for code in range(8):
                codes[8 * eight + code] = (word >> np.uint32(3 * code)) & np.uint32(7)
    elif bits == 2:
        whole = codes.shape[0] & ~3
        for four in range(whole >> 2):
            byte = stream[four]
            codes[4 * four] = byte & 3
            codes[4 * four + 1] = (byte >> 2) & 3
            codes[4 * four + 2] = (byte >> 4) & 3
            codes[4 * four + 3] = byte >> 6
    for column in range(whole, codes.shape[0]):
        first = column * bits
        low = int(stream[first >> 3])
        high = int(stream[(first + bits - 1) >> 3])
        codes[column] = ((low | high << 8) >> (first & 7)) & ((1 << bits) - 1)
