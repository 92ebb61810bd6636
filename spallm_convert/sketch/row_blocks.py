"""Read the weights of a layer in blocks of rows, as they are sketched: a row for each output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from spallm_convert.errors import SourceError, SpallmError
from spallm_convert.source.quantized.weights import TransposedTensor
from spallm_convert.source.reading import read_columns, read_rows
from spallm_formats import StoredTensor

from .layer import Layer

_Read = TypeVar("_Read")


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
    module, tensor = layer.module, layer.weight
    step = max(1, most // module.in_features)
    whole = module.transposed or each_expert
    part = module.out_features if whole else module.rows  # rows that are read without a gap
    for start in range(0, module.rows, part):
        expert = start // module.out_features
        columns = _columns(layer, expert) if module.transposed else None
        for first in range(0, part, step):
            stop = min(first + step, part)
            if columns is None:
                weights = read_source(read_rows, tensor, start + first, start + stop)
            else:
                weights = columns(first, stop)
            yield RowBlock(start + first, first if whole else start + first, weights)


def read_source(
    reader: Callable[[StoredTensor, int, int], _Read], tensor: StoredTensor, start: int, stop: int
) -> _Read:
    """Read a part of a tensor of the source.

    Args:
        reader: The function that reads it.
        tensor: The tensor.
        start: Where the part starts, in the units of `reader`.
        stop: Where it ends.

    Returns:
        What the reader returns.

    Raises:
        SourceError: If the source changed.
    """
    try:
        return reader(tensor, start, stop)
    except SpallmError as error:
        raise SourceError(f"{error} (the source changed during the conversion)") from error


def _columns(layer: Layer, expert: int) -> Callable[[int, int], npt.NDArray[np.float32]]:
    """Return a function that reads columns of an expert's stored matrix, as rows."""
    tensor, size = layer.weight, layer.module.in_features
    if isinstance(tensor, TransposedTensor):  # it is stored by columns, so only these are read

        def read(source: StoredTensor, first: int, stop: int) -> npt.NDArray[np.float32]:
            return read_columns(source, expert, first, stop)

        return lambda first, stop: read_source(read, tensor, first, stop)
    matrix = read_source(read_rows, tensor, expert * size, (expert + 1) * size)
    return lambda first, stop: np.ascontiguousarray(matrix[:, first:stop].T)
