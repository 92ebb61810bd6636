"""Do one pass of coordinate descent over the columns of a block, in one launch.

This is the loop over columns in `batched/descend.py`, with the same arithmetic (`columns.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import COLUMN_TILE, OPTIONS, ColumnTile, nearest, pick
from .device import on


@triton.jit(do_not_specialize=["rows", "columns", "groups", "first", "count"])
def descend_kernel(
    table,
    middles,
    codes,
    dense,
    slopes,
    hessian,
    steps,
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
    """Process ROWS rows in the `count` columns from `first` on."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = tl.minimum(row, rows - 1).to(tl.int64)
    place = tl.arange(0, BLOCK)[None, :]
    inside = place < count
    real = (row < rows)[:, None] & inside
    at = (line * columns)[:, None] + first + place
    near = tl.load(slopes + at, mask=inside, other=0.0)
    value = tl.load(dense + at, mask=inside, other=0.0)
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    step = tl.zeros((ROWS, BLOCK), tl.float32)
    along = hessian + first.to(tl.int64) * columns
    width = columns // groups
    for k in range(count):
        here = place == k
        column = first + k
        diagonal = tl.load(along + column)
        table_number = line * groups + column // width
        old, slope = pick(value, here), pick(near, here)
        lowest = old - tl.div_rn(slope, tl.broadcast_to(diagonal, (ROWS,)))
        found = nearest(lowest, middles, table_number, ENTRIES, PADDED)
        entry = tl.load(table + table_number * ENTRIES + found)
        move = entry - old
        lower = move * (2 * slope + move * diagonal) < 0
        move = tl.where(lower, move, 0.0)
        row_of_h = tl.load(along + first + place, mask=inside, other=0.0)
        near = tl.fma(move[:, None], row_of_h, near)
        step = tl.where(here, move[:, None], step)
        changed = here & lower[:, None]
        value = tl.where(changed, entry[:, None], value)
        code = tl.where(changed, found[:, None], code)
        along += columns
    tl.store(dense + at, value, mask=real)
    tl.store(codes + at, code.to(tl.uint8), mask=real)
    tl.store(steps + (line * count)[:, None] + place, step, mask=real)


def descend_block(
    table: Tensor,
    middles: Tensor,
    codes: Tensor,
    dense: Tensor,
    slopes: Tensor,
    hessian: Tensor,
    first: int,
    last: int,
    *,
    tile: ColumnTile = COLUMN_TILE,
) -> Tensor:
    """Change codes and dense weights in some columns; return how far the weights moved.

    The slopes are not changed: the caller does that. All tensors are contiguous.

    Args:
        table: float32 [rows, groups, entries], ascending.
        middles: float32 [rows, groups, entries - 1].
        codes: uint8 [rows, n], changed.
        dense: float32 [rows, n], changed.
        slopes: float32 [rows, n].
        hessian: float32 [n, n].
        first: First column.
        last: Column after the last.
        tile: Share of one program.

    Returns:
        float32 [rows, last - first].
    """
    (rows, columns), (_, groups, entries) = codes.shape, table.shape
    steps = torch.empty(rows, last - first, dtype=torch.float32, device=codes.device)
    with on(codes.device):
        descend_kernel[(triton.cdiv(rows, tile.rows),)](
            table,
            middles,
            codes,
            dense,
            slopes,
            hessian,
            steps,
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
    return steps
