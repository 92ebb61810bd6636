"""Decode 8-bit floats and 4-bit floats by looking their codes up in a table.

NumPy has no such types. Sources hold weights in FP8 (E4M3, E5M2) and FP4 (E2M1), and scales in E8M0
(OCP Microscaling Formats, version 1.0). The two FNUZ types have no negative zero and another bias.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

#: Bits of exponent and of mantissa, and bias of the exponent, by safetensors dtype.
_LAYOUTS = {
    "F8_E4M3": (4, 3, 7),
    "F8_E5M2": (5, 2, 15),
    "F8_E4M3FNUZ": (4, 3, 8),
    "F8_E5M2FNUZ": (5, 2, 16),
}
_E8M0 = "F8_E8M0"
_E8M0_BIAS, _E8M0_NAN = 127, 255

#: Every dtype that `float8_to_float32` decodes.
FLOAT8_DTYPES = (*_LAYOUTS, _E8M0)

#: The positive half of FP4 (E2M1), by code; the fourth bit is the sign.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def float8_to_float32(raw: bytes | bytearray | memoryview, dtype: str) -> npt.NDArray[np.float32]:
    """Decode 8-bit floats to float32, exactly.

    Args:
        raw: The bytes, one for each number.
        dtype: One of `FLOAT8_DTYPES`.

    Returns:
        float32 [elements].
    """
    decoded: npt.NDArray[np.float32] = _table(dtype)[np.frombuffer(raw, np.uint8)]
    return decoded


def float4_to_float32(raw: bytes | bytearray | memoryview) -> npt.NDArray[np.float32]:
    """Decode FP4 (E2M1) to float32, exactly.

    Args:
        raw: The bytes, two numbers each. The first number is in the lower four bits.

    Returns:
        float32 [2 x bytes].
    """
    return _pairs()[np.frombuffer(raw, np.uint8)].view(np.float32)


@functools.cache
def _table(dtype: str) -> npt.NDArray[np.float32]:
    """Return the value of each of the 256 codes, float32 [256]."""
    codes = np.arange(256)
    if dtype == _E8M0:
        powers = np.ldexp(np.float64(1), codes - _E8M0_BIAS)
        return np.where(codes == _E8M0_NAN, np.nan, powers).astype(np.float32)
    exponent_bits, mantissa_bits, bias = _LAYOUTS[dtype]
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = codes & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits) + (exponent > 0)
    values = np.ldexp(fraction, np.maximum(exponent, 1) - bias)
    values = np.where(codes & 128, -values, values)
    if dtype.endswith("FNUZ"):
        values[128] = np.nan
    elif dtype == "F8_E5M2":
        last = exponent == (1 << exponent_bits) - 1
        values[last] = np.where(mantissa > 0, np.nan, np.copysign(np.inf, values))[last]
    else:
        values[[127, 255]] = np.nan
    table: npt.NDArray[np.float32] = values.astype(np.float32)
    return table


@functools.cache
def _pairs() -> npt.NDArray[np.uint64]:
    """Return the two FP4 numbers in each byte, the bits of two float32 in one item, [256].

    A look-up of one item of 8 bytes is several times faster than one of a row of two.
    """
    numbers = np.array([*_FP4, *(-value for value in _FP4)], np.float32)
    codes = np.arange(256)
    return np.stack([numbers[codes & 15], numbers[codes >> 4]], axis=1).view(np.uint64).reshape(-1)
