"""The `hash` mapping, said as plainly as possible. The optimised one is `cpu/hashing.py`.

The code of the weight in row o and column i is a hash of both, so it is never stored:

    code = mix(i ^ mix(o ^ mix(seed))) mod 2^bits

and a table entry is the least-squares optimum, the mean of the weights that collide.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def mix(x: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """A bijection of 32-bit integers whose output bits each depend on every input bit.

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
    """Codes, uint8 [rows, columns], of rows `first_row`, `first_row` + 1, ... of a module."""
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
    """Least-squares tables, float64 [rows, groups, 2^bits]; a bucket no weight hits holds 0.

    weights: [rows, columns].
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
