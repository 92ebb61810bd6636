"""State the `hash` mapping as plainly as possible. The optimised version is `cpu/hashing.py`.

The code of the weight in row o and column i is a hash of o and i, so it is never stored:

    code = mix(i ^ mix(o ^ mix(seed))) mod 2^bits

A table entry is the least-squares optimum: the mean of the weights that share its code.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def mix(x: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """Map 32-bit integers one to one, so that each output bit depends on every input bit.

    Multipliers and shifts are from hash-prospector's list of low-bias 32-bit mixers (Wellons,
    public domain).
    """
    mixed = np.array(x, np.uint32)
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(0x21F0AAAD)
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0xD35A2D97)
    return mixed ^ (mixed >> np.uint32(15))


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
    keys = mix(np.arange(first_row, first_row + rows, dtype=np.uint32) ^ mix(seed))
    mixed = mix(np.arange(columns, dtype=np.uint32)[None, :] ^ keys[:, None])
    return (mixed & np.uint32((1 << bits) - 1)).astype(np.uint8)


def hash_table(
    weights: npt.ArrayLike,
    groups: int,
    bits: int,
    seed: int,
    first_row: int = 0,
) -> npt.NDArray[np.float64]:
    """Compute least-squares tables for the codes of the `hash` mapping.

    Args:
        weights: [rows, columns].
        groups: Groups per row; must divide the columns.
        bits: Bits of a code.
        seed: Seed of the hash, 0 to 2^32 - 1.
        first_row: Number of the first row in the module.

    Returns:
        Tables, float64 [rows, groups, 2^bits]. An entry whose code no weight has is 0.
    """
    values = np.asarray(weights, np.float64)
    rows, columns = values.shape
    codes = hash_codes(rows, columns, bits, seed, first_row).reshape(rows, groups, -1)
    grouped = values.reshape(codes.shape)
    table = np.zeros((rows, groups, 1 << bits))
    for code in range(1 << bits):
        hit = codes == code
        table[:, :, code] = (hit * grouped).sum(axis=2) / np.maximum(hit.sum(axis=2), 1)
    return table
