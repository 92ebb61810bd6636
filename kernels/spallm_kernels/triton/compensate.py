"""The columns of a block, each making up for the error of those before it, in one launch.

The loop over columns in `batched/compensate.py`, with the same arithmetic: see `columns.py`.
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
    """Takes ROWS rows through the `count` columns that are `first` and later in the order."""
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
        # Zero for the columns up to k, as the factor is above its diagonal.
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
    """Writes the codes of the columns order[first:last] and returns how far their weights moved.

    weights, shift: float32 [rows, n]; table: float32 [rows, groups, entries]; middles: float32
    [rows, groups, entries - 1]; order: int64 [n]; factor: float32 [n, n], zero up to its diagonal;
    codes: uint8 [rows, n]. All are contiguous. Returns float32 [rows, last - first].
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
