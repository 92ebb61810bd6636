"""Describe dense weights that are stored as codes and scales, and decode rows of them.

A weight is `codes x scales`, or `(codes - zero points) x scales`, in float32. A matrix of codes is
cut into blocks, and each block has one scale: a block may be a whole matrix, a row, a group of
columns in a row, or a rectangle. Blocks at the edges may be smaller. Nothing here holds more than
the rows that are asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spallm_formats import (
    FLOAT8_DTYPES,
    FLOAT_STORAGE,
    ITEM_BYTES,
    FormatError,
    StoredTensor,
    float8_to_float32,
    read_bytes,
    shown,
    to_float32,
)

from .encodings import PACKED, Encoding

#: Dtypes of scales that can be read. U8 holds E8M0.
SCALE_DTYPES = (*FLOAT_STORAGE, *FLOAT8_DTYPES, "U8")
_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class DequantizedTensor(StoredTensor, ABC):
    """Describe a dense weight that is stored quantized.

    `name`, `dtype` and `shape` are those of the dense weight. `file` and `offset` are the place of
    its codes.
    """

    @property
    @abstractmethod
    def parts(self) -> tuple[StoredTensor, ...]:
        """Return the stored tensors that the weight is made of."""

    @property
    @abstractmethod
    def scheme(self) -> str:
        """Return how the weight is stored, such as "FP8 in blocks of 128 x 128"."""

    @property
    def rows_at_once(self) -> int:
        """Return how many rows are decoded together if one of them is."""
        return 1

    @abstractmethod
    def read_rows(self, first: int, stop: int) -> _Floats:
        """Decode rows of the weight, seen as one matrix [product of shape[:-1], shape[-1]].

        Args:
            first: The first row.
            stop: The row after the last.

        Returns:
            float32 [stop - first, shape[-1]].

        Raises:
            FormatError: If a file ends earlier than its header says.
        """

    @abstractmethod
    def read_columns(self, matrix: int, first: int, stop: int) -> _Floats:
        """Decode columns of one of the matrices of the weight, as rows.

        Args:
            matrix: Number of the matrix.
            first: The first column.
            stop: The column after the last.

        Returns:
            float32 [stop - first, shape[-2]].

        Raises:
            FormatError: If a file ends earlier than its header says.
        """


@dataclass(frozen=True)
class Scales:
    """Say which scale belongs to which weight.

    Attributes:
        tensor: The scales, seen as a matrix of as many columns as a row of weights has blocks.
        columns: Number of these columns.
        matrix_rows: Rows of one matrix of weights. Blocks do not reach over its end.
        block: Rows and columns of a block.
        zero_points: Zero points of the same blocks; I8 or, packed along the rows, I32.
        zero_bits: Bits of packed zero points.
        order: Block of each column, I32, if columns were sorted before they were cut into blocks.
        common: A scale of the whole weight, which scales are multiplied by.
        divides: Whether scales are divided by `common`.
    """

    tensor: StoredTensor
    columns: int
    matrix_rows: int
    block: tuple[int, int]
    zero_points: StoredTensor | None = None
    zero_bits: int | None = None
    order: StoredTensor | None = None
    common: StoredTensor | None = None
    divides: bool = False

    @property
    def per_matrix(self) -> int:
        """Return the rows of scales that a matrix of weights has."""
        return -(-self.matrix_rows // self.block[0])

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """Return the stored tensors."""
        found = (self.tensor, self.zero_points, self.order, self.common)
        return tuple(part for part in found if part is not None)

    def rows_of(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the row of scales for each row of weights, int64 [stop - first]."""
        rows = np.arange(first, stop)
        return (rows // self.matrix_rows) * self.per_matrix + rows % self.matrix_rows // self.block[
            0
        ]

    def read(self, first: int, stop: int) -> _Floats:
        """Read rows of scales, float32 [stop - first, columns]."""
        scales = _decode(_read_items(self.tensor, first, stop, self.columns), self.tensor.dtype)
        if self.common is not None:
            common = _decode(read_bytes(self.common, 0, self.common.nbytes), self.common.dtype)
            scales = scales / common[0] if self.divides else scales * common[0]
        return scales.reshape(stop - first, self.columns)

    def read_zero_points(self, first: int, stop: int) -> _Floats | None:
        """Read rows of zero points, float32 [stop - first, columns]; None if there are none."""
        if self.zero_points is None:
            return None
        if self.zero_bits is None:
            raw = _read_items(self.zero_points, first, stop, self.columns)
            return np.frombuffer(raw, np.int8).astype(np.float32).reshape(-1, self.columns)
        encoding = PACKED[self.zero_bits]
        start, end = first // encoding.per_item, -(-stop // encoding.per_item)
        words = _read_items(self.zero_points, start, end, self.columns)
        codes = encoding.decode(words).reshape(end - start, self.columns, encoding.per_item)
        rows = codes.transpose(0, 2, 1).reshape(-1, self.columns)
        return rows[first - start * encoding.per_item :][: stop - first]

    def spread(self, values: _Floats, factors: _Floats, operation: Any) -> None:
        """Combine each row of weights with a number for each of its blocks, in place.

        Args:
            values: float32 [rows, columns of the weight].
            factors: float32 [rows, columns].
            operation: A ufunc, such as `np.multiply`.
        """
        if self.order is not None:
            order = np.frombuffer(read_bytes(self.order, 0, self.order.nbytes), "<i4")
            if order.min() < 0 or order.max() >= self.columns:
                raise FormatError(
                    f"{self.order.file.name}: tensor {shown(self.order.name)} holds "
                    f"{order.min()} to {order.max()}, expected 0 to {self.columns - 1}"
                )
            operation(values, factors[:, order], out=values)
            return
        width = self.block[1]
        whole = values.shape[1] // width
        # Cutting an axis never copies: `blocks` is a view of `values`.
        blocks = values[:, : whole * width].reshape(len(values), whole, width)
        operation(blocks, factors[:, :whole, None], out=blocks)
        rest = values[:, whole * width :]
        if rest.size:
            operation(rest, factors[:, whole:], out=rest)


@dataclass(frozen=True)
class ScaledTensor(DequantizedTensor):
    """Describe a weight whose rows are stored as rows of codes.

    Attributes:
        codes: The stored codes.
        encoding: Their encoding.
        scales: The scales.
    """

    codes: StoredTensor
    encoding: Encoding
    scales: Scales

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """Return the stored tensors that the weight is made of."""
        return (self.codes, *self.scales.parts)

    @property
    def scheme(self) -> str:
        """Return how the weight is stored."""
        rows, columns = self.scales.block
        whole = (rows >= self.scales.matrix_rows, columns >= self.shape[-1])
        if all(whole):
            blocks = "with a scale per tensor"
        elif whole[1] and rows == 1:
            blocks = "with a scale per row"
        elif rows == 1:
            blocks = f"in groups of {columns}"
        else:
            blocks = f"in blocks of {rows} x {columns}"
        return f"{self.encoding.title} {blocks}"

    def read_rows(self, first: int, stop: int) -> _Floats:
        """Decode rows of the weight."""
        columns = self.shape[-1]
        raw = _read_items(self.codes, first, stop, columns // self.encoding.per_item)
        values = self.encoding.decode(raw).reshape(stop - first, columns)
        if not values.size:
            return values
        rows = self.scales.rows_of(first, stop)
        low, high = int(rows[0]), int(rows[-1]) + 1
        zero_points = self.scales.read_zero_points(low, high)
        if zero_points is not None:
            self.scales.spread(values, zero_points[rows - low], np.subtract)
        # A scale of infinity times a code of zero is NaN, which whoever sketches reports.
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            self.scales.spread(values, self.scales.read(low, high)[rows - low], np.multiply)
        return values

    def read_columns(self, matrix: int, first: int, stop: int) -> _Floats:
        """Decode columns of one of the matrices of the weight, as rows."""
        rows = self.shape[-2]
        values = self.read_rows(matrix * rows, (matrix + 1) * rows)
        return np.ascontiguousarray(values[:, first:stop].T)


@dataclass(frozen=True)
class TransposedTensor(DequantizedTensor):
    """Describe a weight [matrices, in, out] whose matrices are stored transposed.

    Attributes:
        packed: The weight as it is stored, [matrices, out, in].
    """

    packed: ScaledTensor

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """Return the stored tensors that the weight is made of."""
        return self.packed.parts

    @property
    def scheme(self) -> str:
        """Return how the weight is stored."""
        return self.packed.scheme

    @property
    def rows_at_once(self) -> int:
        """Return the rows of a matrix, because its columns are decoded."""
        return self.shape[-2]

    def read_rows(self, first: int, stop: int) -> _Floats:
        """Decode rows of the weight. Every matrix that has one of them is decoded as a whole."""
        height = self.shape[-2]
        values = np.empty((stop - first, self.shape[-1]), np.float32)
        row = first
        while row < stop:
            matrix, start = divmod(row, height)
            end = min(height, start + stop - row)
            stored = self.read_columns(matrix, 0, self.shape[-1])
            values[row - first : row - first + end - start] = stored[:, start:end].T
            row += end - start
        return values

    def read_columns(self, matrix: int, first: int, stop: int) -> _Floats:
        """Decode columns of one of the matrices of the weight, as rows; only these are read."""
        start = matrix * self.shape[-1]
        return self.packed.read_rows(start + first, start + stop)


def _read_items(tensor: StoredTensor, first: int, stop: int, columns: int) -> bytearray:
    """Read rows of a tensor that is seen as a matrix of some columns."""
    row = columns * ITEM_BYTES[tensor.dtype]
    return read_bytes(tensor, first * row, stop * row)


def _decode(raw: bytearray, dtype: str) -> _Floats:
    """Decode scales of one of `SCALE_DTYPES`."""
    if dtype in FLOAT_STORAGE:
        return to_float32(raw, dtype)
    return float8_to_float32(raw, "F8_E8M0" if dtype == "U8" else dtype)
