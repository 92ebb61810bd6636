"""Decode the codes of quantized weights: FP8, FP4, int8, and integers packed into 32-bit words."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spallm_formats import FLOAT8_DTYPES, float4_to_float32, float8_to_float32

_Bytes = bytes | bytearray | memoryview

#: Bits of packed integers that are read. Others straddle the words, or do not, by version.
PACKED_BITS = (2, 4, 8)
_WORD_BITS = 32


@dataclass(frozen=True)
class Encoding:
    """Say how the codes of a weight are stored.

    Attributes:
        title: Name for people, such as "FP8".
        per_item: Number of codes in one element of the stored tensor.
        decode: Function from bytes to codes, float32 [codes].
    """

    title: str
    per_item: int
    decode: Callable[[_Bytes], npt.NDArray[np.float32]]


def _int8(raw: _Bytes) -> npt.NDArray[np.float32]:
    return np.frombuffer(raw, np.int8).astype(np.float32)


def _packed(raw: _Bytes, bits: int) -> npt.NDArray[np.float32]:
    """Decode unsigned integers, first ones in the lowest bits, that stand for signed ones."""
    words = np.frombuffer(raw, "<u4")
    codes = np.empty((len(words), _WORD_BITS // bits), np.float32)
    mask, middle = np.uint32((1 << bits) - 1), np.float32(1 << (bits - 1))
    for place in range(codes.shape[1]):
        codes[:, place] = (words >> np.uint32(place * bits)) & mask
    codes -= middle
    return codes.reshape(-1)


FP4 = Encoding("FP4", 2, float4_to_float32)
INT8 = Encoding("int8", 1, _int8)
#: FP8, by safetensors dtype. E8M0 is a type of scales.
FP8 = {
    dtype: Encoding("FP8", 1, functools.partial(float8_to_float32, dtype=dtype))
    for dtype in FLOAT8_DTYPES
    if dtype != "F8_E8M0"
}
#: Integers packed into 32-bit words, by their number of bits.
PACKED = {
    bits: Encoding(f"int{bits}", _WORD_BITS // bits, functools.partial(_packed, bits=bits))
    for bits in PACKED_BITS
}
