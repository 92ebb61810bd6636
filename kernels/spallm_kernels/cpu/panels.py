"""Differentiate a sketched product on the CPU without a dense weight or its gradient.

The gradients are two dense products, of which one factor or the result exists in small pieces only:

    x_grad = y_grad W              W is looked up for 64 rows and 64 columns at a time
    weight_grad = y_grad^T x       is added up by codes (see `bins.py`) for 24 rows at a time

Both are sums of outer products, computed by one function: a tile of the result stays in registers
while the rows of the second factor pass by. Matrices are stored as panels of 64 columns, one after
the other, so that a tile reads consecutive memory.

The library's product would serve as well, if a piece were large. But its threads wait for work
actively, which slows down those of the lookup in between.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.core import cgutils
from torch import Tensor

from . import vectorized
from .bins import PIECE, bin_group
from .llvm import (
    FLOAT,
    FLOAT_BYTES,
    Value,
    call,
    element,
    load,
    native,
    number,
    splat,
    store,
    variable,
    vector,
)
from .portable import array
from .tiles import look_up_steps
from .vector_units import VectorUnit, host_unit, unit_of

#: Columns of a panel, and rows that are looked up at a time.
PANEL = PIECE
#: Rows whose gradients exist at a time. All of them read the inputs once.
_ROWS = 24


def supports(y_grad: Tensor, table: Tensor, in_features: int, hash_seed: int | None) -> bool:
    """Return whether the functions below support such tensors.

    Args:
        y_grad: Gradient of the products, any float.
        table: Tables, any float [out_features, groups, 2^bits].
        in_features: Columns of the weight.
        hash_seed: Seed of the `hash` mapping; None if codes are stored.
    """
    if y_grad.dtype != torch.float32 or hash_seed is not None:
        return False
    whole = in_features // table.shape[1] % PANEL == 0
    return whole and vectorized.supports(table, in_features, hash_seed)


def input_grad(y_grad: Tensor, index_map: Tensor, table: Tensor, in_features: int) -> Tensor:
    """Return the gradient of the inputs, y_grad W, float32 [tokens, in_features].

    Args:
        y_grad: float32 [tokens, out_features].
        index_map: Packed codes, uint8 [out_features, row_bytes].
        table: Tables, float [out_features, groups, 2^bits].
        in_features: Columns of the weight.
    """
    unit = host_unit()
    assert unit is not None
    index_map, table = index_map.contiguous(), table.float().contiguous()
    tokens, (rows, groups, entries) = y_grad.shape[0], table.shape
    by_row = y_grad.T.contiguous()
    panels = y_grad.new_zeros(in_features // PANEL, tokens, PANEL)
    _input_grad(unit.key, *unit.panel, unit.lanes, entries.bit_length() - 1)(
        index_map.data_ptr(),
        index_map.shape[1],
        table.data_ptr(),
        groups,
        in_features // groups,
        rows,
        tokens,
        by_row.data_ptr(),
        panels.data_ptr(),
    )
    return panels.transpose(0, 1).reshape(tokens, in_features)


def table_grad(y_grad: Tensor, x: Tensor, index_map: Tensor, table: Tensor) -> Tensor:
    """Return the gradient of the tables, float32 [out_features, groups, 2^bits].

    Args:
        y_grad: float32 [tokens, out_features].
        x: float32 [tokens, in_features].
        index_map: Packed codes, uint8 [out_features, row_bytes].
        table: Tables, float [out_features, groups, 2^bits].
    """
    unit = host_unit()
    assert unit is not None
    tokens, columns = x.shape
    by_row = y_grad.T.contiguous()
    panels = x.reshape(tokens, columns // PANEL, PANEL).transpose(0, 1).contiguous()
    sums = x.new_empty(table.shape)
    kernel = _table_grad(unit.key, *unit.panel, unit.lanes)
    kernel(
        array(index_map.contiguous()),
        columns // table.shape[1],
        by_row.data_ptr(),
        panels.data_ptr(),
        tokens,
        sums.numpy(),
    )
    return sums


@native
def _add_outer_products(  # type: ignore[no-untyped-def]
    context, factors, factor_stride, step_stride, panel, total, steps, unit, rows, vectors
):
    """Add factors[step, row] * panel[step] to total[row], for every step and row of a tile.

    Args:
        context: Numba's typing context.
        factors: Address of the first row's factor for the first step, float32, int64.
        factor_stride: Bytes from a row's factor to that of the next row, int64.
        step_stride: Bytes from a step's factor to that of the next step, int64.
        panel: Address of the tile's columns in a panel, float32 [steps, 64], int64.
        total: Address of the tile's columns in the result, float32 [rows, 64], int64.
        steps: Number of steps, int64.
        unit: Key of the vector unit, a constant.
        rows: Rows of the tile, a constant.
        vectors: Vectors of columns of the tile, a constant.
    """
    described = unit_of(unit.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        shape = rows.literal_value, vectors.literal_value
        factors, factor_stride, step_stride, panel, total, steps = arguments[:6]
        emit_outer_products(
            builder, described, factors, factor_stride, step_stride, panel, total, steps, shape
        )
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, unit, rows, vectors), generate


def emit_outer_products(
    builder: Any,
    unit: VectorUnit,
    factors: Value,
    factor_stride: Value,
    step_stride: Value,
    panel: Value,
    total: Value,
    steps: Value,
    shape: tuple[int, int],
) -> None:
    """Append the instructions of `_add_outer_products`. `shape` has its rows and vectors."""
    rows, vectors = shape
    floats = vector(FLOAT, unit.lanes)
    line_bytes, part_bytes = FLOAT_BYTES * PANEL, FLOAT_BYTES * unit.lanes
    parts = [
        [
            element(
                builder, element(builder, total, number(row), line_bytes), number(part), part_bytes
            )
            for part in range(vectors)
        ]
        for row in range(rows)
    ]
    sums = [[variable(builder, floats) for _ in line] for line in parts]
    for row in range(rows):
        for part in range(vectors):
            builder.store(load(builder, parts[row][part], floats), sums[row][part])
    with cgutils.for_range(builder, steps) as step:
        line = element(builder, panel, step.index, line_bytes)
        columns = [
            load(builder, element(builder, line, number(part), part_bytes), floats)
            for part in range(vectors)
        ]
        first = element(builder, factors, step.index, step_stride)
        for row in range(rows):
            factor = load(builder, element(builder, first, number(row), factor_stride), FLOAT)
            spread = splat(builder, factor, unit.lanes)
            for column, total_of in zip(columns, sums[row], strict=True):
                arguments = [spread, column, builder.load(total_of)]
                added = call(builder, f"llvm.fma.v{unit.lanes}f32", floats, arguments)
                builder.store(added, total_of)
    for row in range(rows):
        for part in range(vectors):
            store(builder, builder.load(sums[row][part]), parts[row][part])


@functools.cache
def _input_grad(unit: str, tall: int, vectors: int, lanes: int, bits: int) -> Callable[..., None]:
    """Return the compiled gradient of the inputs. Numba keeps it on disk."""

    @numba.njit(cache=True, parallel=True, nogil=True)
    def differentiate(
        codes: int, code_stride: int, table: int, groups: int, width: int, rows: int, tokens: int,
        by_row: int, panels: int
    ) -> None:  # fmt: skip
        for number_of_panel in numba.prange(groups * width // PANEL):
            weights = np.empty((PANEL, PANEL), np.float32)
            address = weights.ctypes.data
            group, column = divmod(number_of_panel * PANEL, width)
            result = panels + number_of_panel * tokens * 4 * PANEL
            for first in range(0, rows, PANEL):
                steps = min(PANEL, rows - first)
                for row in range(steps):
                    look_up_steps(
                        codes, code_stride, table, groups, width, 0, first + row, group,
                        column // 16, PANEL // 16, address + row * 4 * PANEL,
                        unit, bits, "float32", 0
                    )  # fmt: skip
                factors = by_row + first * 4 * tokens
                for part in range(0, PANEL, vectors * lanes):
                    token = 0
                    while token + tall <= tokens:
                        _add_outer_products(
                            factors + 4 * token, 4, 4 * tokens, address + 4 * part,
                            result + token * 4 * PANEL + 4 * part, steps, unit, tall, vectors
                        )  # fmt: skip
                        token += tall
                    while token < tokens:
                        _add_outer_products(
                            factors + 4 * token, 4, 4 * tokens, address + 4 * part,
                            result + token * 4 * PANEL + 4 * part, steps, unit, 1, vectors
                        )  # fmt: skip
                        token += 1

    return differentiate


@functools.cache
def _table_grad(unit: str, tall: int, vectors: int, lanes: int) -> Callable[..., None]:
    """Return the compiled gradient of the tables. Numba keeps it on disk."""

    @numba.njit(cache=True, parallel=True, nogil=True)
    def differentiate(packed, width, by_row, panels, tokens, sums) -> None:  # type: ignore[no-untyped-def]
        rows, groups, _ = sums.shape
        for task in numba.prange((rows + _ROWS - 1) // _ROWS):
            first, end = task * _ROWS, min(rows, (task + 1) * _ROWS)
            gradient = np.empty((width // PANEL, _ROWS, PANEL), np.float32)
            for group in range(groups):
                gradient[:] = 0
                for number_of_panel in range(width // PANEL):
                    panel = (
                        panels + (group * (width // PANEL) + number_of_panel) * tokens * 4 * PANEL
                    )
                    result = gradient.ctypes.data + number_of_panel * _ROWS * 4 * PANEL
                    for part in range(0, PANEL, vectors * lanes):
                        row = first
                        while row + tall <= end:
                            _add_outer_products(
                                by_row + row * 4 * tokens, 4 * tokens, 4, panel + 4 * part,
                                result + (row - first) * 4 * PANEL + 4 * part, tokens,
                                unit, tall, vectors
                            )  # fmt: skip
                            row += tall
                        while row < end:
                            _add_outer_products(
                                by_row + row * 4 * tokens, 4 * tokens, 4, panel + 4 * part,
                                result + (row - first) * 4 * PANEL + 4 * part, tokens,
                                unit, 1, vectors
                            )  # fmt: skip
                            row += 1
                for row in range(first, end):
                    pieces = gradient.ctypes.data + (row - first) * 4 * PANEL
                    bin_group(
                        packed[row], group * width, width, pieces, _ROWS * 4 * PANEL,
                        sums[row, group]
                    )  # fmt: skip

    return differentiate
