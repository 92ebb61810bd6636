"""Read the weights of a layer in blocks of rows, as they are sketched: a row for each output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spallm_convert.errors import SourceError, SpallmError
from spallm_formats import ITEM_BYTES, StoredTensor, read_bytes, to_float32

from .layer import Layer


@dataclass(frozen=True)
class RowBlock:
    """Hold consecutive rows of a layer.

    Attributes:
        first: Number of the first row in the layer. Rows of fused experts lie below each other.
        first_of_expert: Number of the first row in its expert; `first` without experts.
        weights: The weights, float32 [rows, in_features].
    """

    first: int
    first_of_expert: int
    weights: npt.NDArray[np.float32]


def row_blocks(layer: Layer, most: int, *, each_expert: bool = False) -> Iterator[RowBlock]:
    """Read the weights of a layer.

    Args:
        layer: The layer.
        most: The most weights in a block, unless one row has more. A transposed weight, or that of
            one expert, is read at once.
        each_expert: Whether no block may hold rows of two experts.

    Yields:
        Blocks in order.

    Raises:
        SourceError: If the source changed.
    """
    module = layer.module
    step = max(1, most // module.in_features)
    whole = layer.module.transposed or each_expert
    part = module.out_features if whole else module.rows  # rows that are read without a gap
    for start in range(0, module.rows, part):
        turned = _transposed(layer, start) if module.transposed else None
        for first in range(0, part, step):
            rows = min(step, part - first)
            if turned is None:
                weights = _rows(layer, start + first, rows)
            else:
                weights = np.ascontiguousarray(turned[first : first + rows])
            yield RowBlock(start + first, first if whole else start + first, weights)


def read_source(tensor: StoredTensor, start: int, stop: int) -> bytearray:
    """Read bytes [start, stop) of a tensor of the source.

    Raises:
        SourceError: If the source changed.
    """
    try:
        return read_bytes(tensor, start, stop)
    except SpallmError as error:
        raise SourceError(f"{error} (the source changed during the conversion)") from error


def _rows(layer: Layer, first: int, rows: int) -> npt.NDArray[np.float32]:
    tensor, columns = layer.weight, layer.module.in_features
    row_bytes = columns * ITEM_BYTES[tensor.dtype]
    raw = read_source(tensor, first * row_bytes, (first + rows) * row_bytes)
    return to_float32(raw, tensor.dtype).reshape(rows, columns)


def _transposed(layer: Layer, start: int) -> npt.NDArray[np.float32]:
    """Return the weight of the layer, or of the expert whose first row is `start`."""
    tensor, module = layer.weight, layer.module
    count = module.in_features * module.out_features * ITEM_BYTES[tensor.dtype]
    offset = start // module.out_features * count
    raw = read_source(tensor, offset, offset + count)
    return to_float32(raw, tensor.dtype).reshape(module.in_features, module.out_features).T
