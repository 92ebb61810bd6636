"""One column at a time inside a kernel: what `compensate.py` and `descend.py` share.

A program keeps a block of columns of a few rows in registers, and one warp holds all columns of a
row, so that no step waits for another warp. Sums that later columns depend on are fused
multiply-adds, which is how torch's `addcmul` rounds; all other operations round one by one
(`enable_fp_fusion` is off), so that the kernels decide exactly as the loops in torch do.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True, kw_only=True)
class ColumnTile:
    """How many `rows` a program takes through a block of columns, and on how many `warps`."""

    rows: int
    warps: int


#: 2048 rows give every scheduler of an H100 two programs: one works while the other waits. A step
#: of two rows takes 180 to 270 instructions. Chosen from what it compiles to, not measured.
COLUMN_TILE = ColumnTile(rows=2, warps=1)
#: For launches: no fused multiply-add except where a kernel asks for it.
OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def pick(tile, chosen):
    """Returns one column [ROWS] of a tile [ROWS, BLOCK]; chosen: int1 [1, BLOCK], true once.

    Exact, because all other terms of the sum are zero.
    """
    return tl.sum(tl.where(chosen, tile, 0.0), 1)


@triton.jit
def nearest(value, middles, table_number, ENTRIES: tl.constexpr, PADDED: tl.constexpr):
    """Returns the codes, int32 [ROWS], of the entries nearest to values, the lower one of two.

    value: float32 [ROWS]; middles: float32 [tables, ENTRIES - 1] in memory; table_number: int64
    [ROWS]; PADDED: a power of two of at least ENTRIES.
    """
    entry = tl.arange(0, PADDED)[None, :]
    start = middles + (table_number * (ENTRIES - 1))[:, None]
    middle = tl.load(start + entry, mask=entry < ENTRIES - 1, other=float("inf"))
    return tl.sum((value[:, None] > middle).to(tl.int32), 1)
