"""Compute the `hash` mapping in numba: codes from row, column and seed, and least-squares tables.

`reference/hashing.py` gives the formulas and the source of the mixer.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

Singles = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

#: Shifts and multipliers of the mixer, in turn.
SHIFTS = (16, 15, 15)
MULTIPLIERS = (0x21F0AAAD, 0xD35A2D97)


def hash_codes(
    rows: int, columns: int, bits: int, seed: int, first_row: int = 0
) -> npt.NDArray[np.uint8]:
    """Compute the codes of rows of a module under the `hash` mapping.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        bits: Bits of a code.
        seed: Seed of the hash, 0 to 2^32 - 1.
        first_row: Number of the first row in the module.

    Returns:
        Codes, uint8 [rows, columns].
    """
    codes = np.empty((rows, columns), np.uint8)
    _hash_rows(np.uint32(seed), np.uint32(first_row), np.uint32((1 << bits) - 1), codes)
    return codes


def hash_table(weights: Singles, groups: int, bits: int, seed: int, first_row: int = 0) -> Floats:
    """Compute least-squares tables for the codes of the `hash` mapping.

    Args:
        weights: float32 [rows, columns].
        groups: Groups per row; must divide the columns.
        bits: Bits of a code.
        seed: Seed of the hash, 0 to 2^32 - 1.
        first_row: Number of the first row in the module.

    Returns:
        Tables, float64 [rows, groups, 2^bits]. An entry whose code no weight has is 0.

    Raises:
        ValueError: If `groups` does not divide the columns.
    """
    rows, columns = weights.shape
    if columns % groups:
        raise ValueError(f"groups must divide the columns, found {groups} and {columns}")
    table = np.empty((rows, groups, 1 << bits))
    _table_rows(
        np.ascontiguousarray(weights),
        np.uint32(seed),
        np.uint32(first_row),
        table,
    )
    return table


@numba.njit(cache=True, nogil=True, inline="always")
def mix(x: np.uint32) -> np.uint32:
    """Map a 32-bit integer to another, one to one (see `reference/hashing.py`)."""
    x = np.uint32(x ^ (x >> np.uint32(SHIFTS[0])))
    x = np.uint32(x * np.uint32(MULTIPLIERS[0]))
    x = np.uint32(x ^ (x >> np.uint32(SHIFTS[1])))
    x = np.uint32(x * np.uint32(MULTIPLIERS[1]))
    return np.uint32(x ^ (x >> np.uint32(SHIFTS[2])))


@numba.njit(cache=True, parallel=True, nogil=True)
def _hash_rows(
    seed: np.uint32, first_row: np.uint32, mask: np.uint32, codes: npt.NDArray[np.uint8]
) -> None:
    for row in numba.prange(codes.shape[0]):
        key = mix(np.uint32(first_row + np.uint32(row)) ^ mix(seed))
        for column in range(codes.shape[1]):
            codes[row, column] = mix(np.uint32(column) ^ key) & mask


@numba.njit(cache=True, parallel=True, nogil=True)
def _table_rows(weights: Singles, seed: np.uint32, first_row: np.uint32, table: Floats) -> None:
    rows, groups, entries = table.shape
    width = weights.shape[1] // groups
    mask = np.uint32(entries - 1)
    for row in numba.prange(rows):
        key = mix(np.uint32(first_row + np.uint32(row)) ^ mix(seed))
        counts, sums = np.empty(entries), np.empty(entries)
        for group in range(groups):
            counts[:] = sums[:] = 0.0
            for column in range(group * width, (group + 1) * width):
                code = mix(np.uint32(column) ^ key) & mask
                counts[code] += 1.0
                sums[code] += np.float64(weights[row, column])
            for entry in range(entries):
                table[row, group, entry] = sums[entry] / max(counts[entry], 1.0)
