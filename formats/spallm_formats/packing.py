"""Pack the index map: codes of 1 to 8 bits as one little-endian bit stream per row.

Code i of a row occupies bits [i * bits, (i + 1) * bits) of the stream, least significant first. Bit
b of the stream is bit b % 8 of byte b // 8. Every row is padded with zero bits to a multiple of 16
bytes, so that rows stay aligned for wide loads.

`pack_reference` and `unpack_reference` do that in a few lines of NumPy. `pack` and `unpack` give
the same result with the loops of `bitstream.py`: in parallel, and without the byte per bit that the
reference needs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ROW_ALIGNMENT = 16
MAX_BITS = 8

Bytes = npt.NDArray[np.uint8]


def row_bytes(in_features: int, bits: int) -> int:
    """Return the bytes of one packed row, padding included.

    Args:
        in_features: Codes per row.
        bits: Bits of a code, 1 to 8.
    """
    used = (in_features * bits + 7) // 8
    return -(-used // ROW_ALIGNMENT) * ROW_ALIGNMENT


def pack_reference(codes: Bytes, bits: int) -> Bytes:
    """Pack codes bit by bit, as a reference for `pack`.

    Args:
        codes: uint8 [rows, in_features], each below 2^bits.
        bits: Bits of a code, 1 to 8.

    Returns:
        Packed rows, uint8 [rows, row_bytes].

    Raises:
        ValueError: If the dtype, rank or `bits` is wrong, or a code does not fit in `bits`.
    """
    _check_codes(codes, bits)
    stream = np.unpackbits(codes[:, :, None], axis=2, count=bits, bitorder="little")
    packed = np.packbits(
        stream.reshape(len(codes), codes.shape[1] * bits), axis=1, bitorder="little"
    )
    return np.pad(packed, ((0, 0), (0, row_bytes(codes.shape[1], bits) - packed.shape[1])))


def unpack_reference(packed: Bytes, bits: int, in_features: int) -> Bytes:
    """Unpack codes bit by bit, as a reference for `unpack`.

    Args:
        packed: uint8 [rows, row_bytes].
        bits: Bits of a code, 1 to 8.
        in_features: Codes per row.

    Returns:
        Codes, uint8 [rows, in_features].

    Raises:
        ValueError: If the dtype, shape or `bits` is wrong.
    """
    _check_packed(packed, bits, in_features)
    stream = np.unpackbits(packed, axis=1, count=in_features * bits, bitorder="little")
    fields = stream.reshape(len(packed), in_features, bits)
    return np.packbits(fields, axis=2, bitorder="little")[:, :, 0]


def pack(codes: Bytes, bits: int) -> Bytes:
    """Pack codes in parallel.

    Args:
        codes: uint8 [rows, in_features], each below 2^bits.
        bits: Bits of a code, 1 to 8.

    Returns:
        Packed rows, uint8 [rows, row_bytes].

    Raises:
        ValueError: If the dtype, rank or `bits` is wrong, or a code does not fit in `bits`.
    """
    _check_codes(codes, bits)
    from .bitstream import pack_rows

    packed = np.zeros((len(codes), row_bytes(codes.shape[1], bits)), np.uint8)
    pack_rows(np.ascontiguousarray(codes), bits, packed)
    return packed


def unpack(packed: Bytes, bits: int, in_features: int) -> Bytes:
    """Unpack codes in parallel.

    Args:
        packed: uint8 [rows, row_bytes].
        bits: Bits of a code, 1 to 8.
        in_features: Codes per row.

    Returns:
        Codes, uint8 [rows, in_features].

    Raises:
        ValueError: If the dtype, shape or `bits` is wrong.
    """
    _check_packed(packed, bits, in_features)
    from .bitstream import unpack_rows

    codes = np.empty((len(packed), in_features), np.uint8)
    unpack_rows(np.ascontiguousarray(packed), bits, codes)
    return codes


def padding_is_zero(packed: Bytes, bits: int, in_features: int) -> bool:
    """Return whether every bit after the last code of every row is zero."""
    used_bits = in_features * bits
    tail = packed[:, used_bits // 8 :]
    if used_bits % 8 == 0:
        return not tail.any()
    return not ((tail[:, 0] >> (used_bits % 8)).any() or tail[:, 1:].any())


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be 1 to {MAX_BITS}, found {bits!r}")


def _check_codes(codes: Bytes, bits: int) -> None:
    _check_bits(bits)
    if codes.dtype != np.uint8 or codes.ndim != 2:
        raise ValueError(f"codes must be uint8 [rows, columns], found {codes.dtype} {codes.shape}")
    if codes.size and int(codes.max()) >> bits:
        raise ValueError(f"codes must be below {1 << bits} at {bits} bits, found {codes.max()}")


def _check_packed(packed: Bytes, bits: int, in_features: int) -> None:
    _check_bits(bits)
    expected = row_bytes(in_features, bits)
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != expected:
        raise ValueError(
            f"packed rows of {in_features} codes at {bits} bits must be uint8 [rows, {expected}], "
            f"found {packed.dtype} {packed.shape}"
        )
