"""Choose the codes of a block of columns in one launch, each column compensating earlier errors.

This is the loop over columns in `batched/compensate.py`, with the same arithmetic (`columns.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import COLUMN_TILE, OPTIONS, ColumnTile, nearest, pick
from .device import on


@triton.jit(do_not_specialize=["rows", "columns", "groups", "first", "count"])
def compensate_kernel(
    weights,
    table,
    middles,
    order,
    factor,
    shift,
    codes,
    moved,
    rows,
    columns,
    groups,
    first,
    count,
    ENTRIES: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Process ROWS rows in the `count` columns from place `first` of the order on."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = tl.minimum(row, rows - 1).to(tl.int64)
    place = tl.arange(0, BLOCK)[None, :]
    inside = place < count
    real = (row < rows)[:, None] & inside
    column = tl.load(order + first + place, mask=inside, other=0)
    at = (line * columns)[:, None]
    weight = tl.load(weights + at + column, mask=inside, other=0.0)
    near = tl.load(shift + at + first + place, mask=inside, other=0.0)
    step = tl.zeros((ROWS, BLOCK), tl.float32)
    code = tl.zeros((ROWS, BLOCK), tl.int32)
    along = factor + first.to(tl.int64) * columns + first + place
    width = columns // groups
    for k in range(count):
        here = place == k
        group = tl.load(order + first + k).to(tl.int32) // width  # dividing int64 is a call
        table_number = line * groups + group
        old = pick(weight, here)
        found = nearest(old - pick(near, here), middles, table_number, ENTRIES, PADDED)
        move = tl.load(table + table_number * ENTRIES + found) - old
        # Zero for the columns up to k, because the factor is zero on and below its diagonal.
        factors = tl.load(along, mask=inside, other=0.0)
        near = tl.fma(move[:, None], factors, near)
        step = tl.where(here, move[:, None], step)
        code = tl.where(here, found[:, None], code)
        along += columns
    tl.store(codes + at + column, code.to(tl.uint8), mask=real)
    tl.store(moved + (line * count)[:, None] + place, step, mask=real)


def compensate_block(
    weights: Tensor,
    table: Tensor,
    middles: Tensor,
    order: Tensor,
    factor: Tensor,
    shift: Tensor,
    codes: Tensor,
    first: int,
    last: int,
    *,
    tile: ColumnTile = COLUMN_TILE,
) -> Tensor:
    """Write the codes of the columns order[first:last] and return how far their weights moved.

    All tensors are contiguous.

    Args:
        weights: float32 [rows, n].
        table: float32 [rows, groups, entries], ascending.
        middles: float32 [rows, groups, entries - 1].
        order: int64 [n].
        factor: float32 [n, n], zero on and below its diagonal.
        shift: float32 [rows, n].
        codes: uint8 [rows, n], written.
        first: Place in the order of the first column.
        last: Place after the last column.
        tile: Share of one program.

    Returns:
        float32 [rows, last - first].
    """
    (rows, columns), (_, groups, entries) = weights.shape, table.shape
    moved = torch.empty(rows, last - first, dtype=torch.float32, device=weights.device)
    with on(weights.device):
        compensate_kernel[(triton.cdiv(rows, tile.rows),)](
            weights,
            table,
            middles,
            order,
            factor,
            shift,
            codes,
            moved,
            rows,
            columns,
            groups,
            first,
            last - first,
            ENTRIES=entries,
            PADDED=triton.next_power_of_2(entries),
            ROWS=tile.rows,
            BLOCK=triton.next_power_of_2(last - first),
            num_warps=tile.warps,
            **OPTIONS,
        )
    return moved
