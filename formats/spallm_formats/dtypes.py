"""Element types: their safetensors names, sizes, and the way to and from float32.

NumPy has no bfloat16, so bf16 data travels as uint16 bit patterns: a bf16 is the upper half of the
float32 of the same value.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: Bytes per element of every safetensors dtype that a checkpoint may hold.
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}

#: How float data of each dtype lies in a NumPy array.
FLOAT_STORAGE: dict[str, npt.DTypeLike] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}

#: Names of the table dtypes in `config.json` (torch's names) and in safetensors.
TABLE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def to_float32(raw: bytes | bytearray | memoryview, dtype: str) -> npt.NDArray[np.float32]:
    """Decodes little-endian `dtype` data ("BF16", "F16" or "F32") into a flat float32 array."""
    stored = np.frombuffer(raw, dtype=np.dtype(FLOAT_STORAGE[dtype]).newbyteorder("<"))
    if dtype == "BF16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)


def from_float32(values: npt.ArrayLike, dtype: str) -> npt.NDArray[np.generic]:
    """Rounds to `dtype`, ties to even; bf16 comes back as uint16 bit patterns.

    Values are first rounded to float32, so float64 input is rounded twice: one value in some 2^17
    (bf16) or 2^14 (f16) ends at the other of two neighbours that are all but equally near.
    """
    wide = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "BF16":
        bits = wide.view(np.uint32)
        rounded = (
            bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        ) >> np.uint32(16)
        return np.where(np.isnan(wide), np.uint32(0x7FC0), rounded).astype(np.uint16)
    with np.errstate(over="ignore"):
        return wide.astype(FLOAT_STORAGE[dtype])
