"""Process one column at a time inside a kernel, for `compensate.py` and `descend.py`.

A program keeps a block of columns of a few rows in registers. One warp holds all columns of a row,
so no step waits for another warp. Sums that later columns depend on are fused multiply-adds, which
round as torch's `addcmul` does. All other operations round one by one (`enable_fp_fusion` is off),
so the kernels decide exactly as the loops in torch do.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True, kw_only=True)
class ColumnTile:
    """Set how many `rows` a program takes through a block of columns, and on how many `warps`."""

    rows: int
    warps: int


#: With 2048 rows every scheduler of an H100 gets two programs: one runs while the other waits. A
#: step of two rows takes 180 to 270 instructions. Chosen from the compiled code, not measured.
COLUMN_TILE = ColumnTile(rows=2, warps=1)
#: Options of launches: no fused multiply-add unless a kernel asks for it.
OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def pick(tile, chosen):
    """Return one column [ROWS] of a tile [ROWS, BLOCK]; chosen is int1 [1, BLOCK], true once.

    The result is exact, because all other terms of the sum are zero.
    """
    return tl.sum(tl.where(chosen, tile, 0.0), 1)


@triton.jit
def nearest(value, middles, table_number, ENTRIES: tl.constexpr, PADDED: tl.constexpr):
    """Return the codes, int32 [ROWS], of the nearest entries; of two as near, the lower code.

    value: float32 [ROWS]. middles: float32 [tables, ENTRIES - 1] in memory. table_number: int64
    [ROWS]. PADDED: a power of two of at least ENTRIES.
    """
    entry = tl.arange(0, PADDED)[None, :]
    start = middles + (table_number * (ENTRIES - 1))[:, None]
    middle = tl.load(start + entry, mask=entry < ENTRIES - 1, other=float("inf"))
    return tl.sum((value[:, None] > middle).to(tl.int32), 1)
