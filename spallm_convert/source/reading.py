"""Read weights of a source in float32 or as stored, whether they are stored dense or quantized.

A tensor of any number of dimensions is seen as one matrix, [product of shape[:-1], shape[-1]]. A
tensor with three dimensions is a stack of matrices, such as the experts of a layer.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from spallm_formats import ITEM_BYTES, StoredTensor, from_float32, read_bytes, to_float32

from .quantized.weights import DequantizedTensor

#: Weights that are decoded at a time for `read_stored`.
_BLOCK_WEIGHTS = 1 << 22


def read_rows(tensor: StoredTensor, first: int, stop: int) -> npt.NDArray[np.float32]:
    """Read rows of a tensor.

    Args:
        tensor: A tensor of a dtype in `FLOAT_STORAGE`, stored dense or quantized.
        first: The first row.
        stop: The row after the last.

    Returns:
        float32 [stop - first, columns].

    Raises:
        FormatError: If the file ends earlier than its header says.
    """
    if isinstance(tensor, DequantizedTensor):
        return tensor.read_rows(first, stop)
    columns = _columns(tensor)
    row_bytes = columns * ITEM_BYTES[tensor.dtype]
    raw = read_bytes(tensor, first * row_bytes, stop * row_bytes)
    return to_float32(raw, tensor.dtype).reshape(stop - first, columns)


def read_matrix(tensor: StoredTensor, index: int) -> npt.NDArray[np.float32]:
    """Read one matrix of a stack of matrices, such as one expert.

    Args:
        tensor: A tensor [matrices, rows, columns], stored dense or quantized.
        index: Number of the matrix.

    Returns:
        float32 [rows, columns].

    Raises:
        FormatError: If the file ends earlier than its header says.
    """
    rows = tensor.shape[-2]
    return read_rows(tensor, index * rows, (index + 1) * rows)


def read_columns(
    tensor: StoredTensor, index: int, first: int, stop: int
) -> npt.NDArray[np.float32]:
    """Read columns of one matrix of a stack of matrices, as rows.

    Matrices of experts can be stored transposed, [in, out]: columns of these are rows of the
    layer's weight. Weights in MXFP4 are stored by such rows, and only these are read then. Of other
    weights the whole matrix is read.

    Args:
        tensor: A tensor [matrices, rows, columns], stored dense or quantized.
        index: Number of the matrix.
        first: The first column.
        stop: The column after the last.

    Returns:
        float32 [stop - first, rows].

    Raises:
        FormatError: If the file ends earlier than its header says.
    """
    if isinstance(tensor, DequantizedTensor):
        return tensor.read_columns(index, first, stop)
    return np.ascontiguousarray(read_matrix(tensor, index)[:, first:stop].T)


def read_stored(tensor: StoredTensor, start: int, stop: int) -> bytearray:
    """Read bytes of a tensor. A weight that is stored quantized is dequantized, and rounded.

    Args:
        tensor: A tensor of any dtype, stored dense or quantized.
        start: First byte, counted from the first byte of the dense tensor.
        stop: Byte after the last.

    Returns:
        Bytes [start, stop) of the dense tensor.

    Raises:
        FormatError: If the file ends earlier than its header says.
    """
    if not isinstance(tensor, DequantizedTensor):
        return read_bytes(tensor, start, stop)
    row_bytes = _columns(tensor) * ITEM_BYTES[tensor.dtype]
    if not row_bytes:
        return bytearray()
    first, end = start // row_bytes, -(-stop // row_bytes)
    unit = tensor.rows_at_once
    step = max(1, _BLOCK_WEIGHTS // _columns(tensor) // unit) * unit
    data = bytearray()
    for row in range(first // unit * unit, end, step):
        rows = read_rows(tensor, max(row, first), min(row + step, end))
        data += from_float32(rows, tensor.dtype).tobytes()
    return data[start - first * row_bytes : stop - first * row_bytes]


def stored_parts(tensor: StoredTensor) -> tuple[StoredTensor, ...]:
    """Return the tensors in files that a tensor is made of: itself, if it is stored dense."""
    return tensor.parts if isinstance(tensor, DequantizedTensor) else (tensor,)


def _columns(tensor: StoredTensor) -> int:
    """Return the last dimension of a tensor, 1 for a single number."""
    return tensor.shape[-1] if tensor.shape else 1
