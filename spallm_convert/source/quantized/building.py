"""Match codes with their scales, by the shapes in the headers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spallm_formats import FLOAT8_DTYPES, FLOAT_STORAGE, StoredTensor, shown

from .encodings import PACKED, Encoding
from .weights import SCALE_DTYPES, DequantizedTensor, ScaledTensor, Scales


@dataclass
class Found:
    """Collect the quantized weights of a checkpoint.

    Attributes:
        weights: The dense weights that are stored quantized, by name.
        used: Names of the stored tensors that these weights are made of.
        problems: What is wrong with other quantized weights, in one line each.
    """

    weights: dict[str, DequantizedTensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def add(self, weight: DequantizedTensor | str) -> None:
        """Add a weight, or the problem why it cannot be read."""
        if isinstance(weight, str):
            self.problems.append(weight)
        elif weight.name in self.weights:
            self.problems.append(
                f"{weight.file.name}: tensor {shown(weight.name)} has scales under several names"
            )
        else:
            self.weights[weight.name] = weight
            self.used |= {part.name for part in weight.parts}


#: A finder of the weights that are stored by one method.
#:
#: Args: every tensor of the checkpoint by name, the description of the quantization in its config,
#: and the dtype of dense weights.
Finder = Callable[[Mapping[str, StoredTensor], Mapping[str, Any], str], Found]


def scaled(
    name: str,
    codes: StoredTensor,
    encoding: Encoding,
    scales: StoredTensor,
    dtype: str,
    *,
    block: tuple[int, int] | None = None,
    **more: Any,
) -> ScaledTensor | str:
    """Describe a weight that is stored as codes and scales.

    Args:
        name: Name of the dense weight.
        codes: Its codes, with two dimensions or more.
        encoding: The encoding of the codes.
        scales: Its scales: one, one for each row, or a matrix of as many dimensions as the codes
            have, with one for each block.
        dtype: The dtype of the dense weight.
        block: Rows and columns of a block, if the config says. Otherwise, or if there is another
            number of scales, the blocks are as many equal ones as there are scales.
        more: Further fields of `Scales`.

    Returns:
        The weight; the problem, in one line, if its parts do not fit each other.
    """
    where = f"{codes.file.name}: tensor {shown(codes.name)} {list(codes.shape)}"
    if len(codes.shape) < 2 or not codes.elements:
        return f"{where} has no rows and columns, so it cannot be dequantized"
    if scales.dtype not in SCALE_DTYPES:
        accepted = ", ".join((*FLOAT_STORAGE, *FLOAT8_DTYPES))
        return f"{where} has scales of dtype {scales.dtype}, expected one of {accepted}"
    shape = (*codes.shape[:-1], codes.shape[-1] * encoding.per_item)
    grid = _grid(shape, scales.shape)
    if grid is None:
        return f"{where} does not fit its scales {shown(scales.name)} {list(scales.shape)}"
    leading, counts = grid
    sizes = (shape[-2] if leading else math.prod(shape[:-1]), shape[-1])
    given = block or (None, None)
    blocks = [_block(*each) for each in zip(sizes, counts, given, strict=True)]
    if None in blocks:
        return f"{where} does not fit its scales {shown(scales.name)} {list(scales.shape)}"
    rows, columns = (each for each in blocks if each is not None)
    table = Scales(scales, counts[1], sizes[0], (rows, columns), **more)
    if problem := _misfit(table, shape):
        return f"{where} {problem}"
    return ScaledTensor(name, dtype, shape, codes.file, codes.offset, codes, encoding, table)


def block_size(value: Any) -> tuple[int, int] | None:
    """Return the rows and columns of a block that a config names, None if it names none."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    rows, columns = value
    if type(rows) is not int or type(columns) is not int or min(rows, columns) < 1:
        return None
    return rows, columns


def _misfit(scales: Scales, shape: tuple[int, ...]) -> str | None:
    """Return why zero points, order or common scale do not fit a weight, None if they do."""
    zero_points, order, common = scales.zero_points, scales.order, scales.common
    if zero_points is not None:
        rows = math.prod(shape[:-1]) // scales.matrix_rows * scales.per_matrix
        dtype, expected = "I8", rows
        if scales.zero_bits is not None:
            dtype, expected = "I32", -(-rows // PACKED[scales.zero_bits].per_item)
        if zero_points.dtype != dtype or zero_points.elements != expected * scales.columns:
            return f"does not fit its zero points, {zero_points.dtype} {list(zero_points.shape)}"
    if order is not None and (order.dtype != "I32" or order.shape != shape[-1:]):
        return f"does not fit its order of columns, {order.dtype} {list(order.shape)}"
    if common is not None and (common.dtype not in FLOAT_STORAGE or common.elements != 1):
        return f"does not fit its common scale, {common.dtype} {list(common.shape)}"
    return None


def _grid(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[bool, tuple[int, int]] | None:
    """Return how many blocks a matrix has in each direction; None if scales do not fit.

    The first value says whether each matrix of a stack has scales of its own.
    """
    if math.prod(scales) == 1:
        return False, (1, 1)
    if len(scales) == len(shape) and scales[:-2] == shape[:-2]:
        return True, (scales[-2], scales[-1])
    if len(shape) == 2 and scales == shape[:1]:
        return True, (shape[0], 1)
    if len(shape) == 3 and scales == shape[:1]:
        return True, (1, 1)
    return None


def _block(size: int, count: int, given: int | None) -> int | None:
    """Return the size of the blocks that cut `size` into `count`; None if there is none."""
    if given and -(-size // given) == count:
        return given
    return size // count if count and size % count == 0 else None
