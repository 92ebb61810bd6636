"""Define element types: their safetensors names and sizes, and conversion to and from float32.

NumPy has no bfloat16, so bf16 data is held as uint16 bit patterns: a bf16 is the upper half of the
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

#: NumPy dtype that holds float data of each safetensors dtype.
FLOAT_STORAGE: dict[str, npt.DTypeLike] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}

#: Names of the table dtypes in `config.json` (torch's names) and in safetensors.
TABLE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def to_float32(raw: bytes | bytearray | memoryview, dtype: str) -> npt.NDArray[np.float32]:
    """Decode little-endian data to float32.

    Args:
        raw: The bytes.
        dtype: "BF16", "F16" or "F32".

    Returns:
        float32 [elements].
    """
    stored = np.frombuffer(raw, dtype=np.dtype(FLOAT_STORAGE[dtype]).newbyteorder("<"))
    if dtype == "BF16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)


def from_float32(values: npt.ArrayLike, dtype: str) -> npt.NDArray[np.generic]:
    """Round values to a stored dtype, ties to even.

    Values are first rounded to float32, so float64 input is rounded twice. About one value in 2^17
    (bf16) or 2^14 (f16) is then rounded to the other of two neighbours that are almost equally
    near.

    Args:
        values: Values of any shape.
        dtype: "BF16", "F16" or "F32".

    Returns:
        The rounded values, in the same shape; bf16 as uint16 bit patterns.
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
