"""Tile choices: how much of a layer one program of each kernel takes, per GPU generation.

Nothing is searched for at run time. `benchmarks/gpu/tune.py` measures the alternatives on a device;
what it finds better belongs here.
"""

from __future__ import annotations

from dataclasses import dataclass

from .ptx import UNIT_CODES

#: Most tokens that the fused product takes by default; a dense weight should serve more sooner.
DECODE_TOKENS = 64
#: The same where codes are hashed: sixteen instructions per weight are better spent once.
HASHED_DECODE_TOKENS = 16
#: Groups must be a whole number of these columns for lookups in whole units.
ALIGNMENT = 32

_MOST_SLOTS = 8
_SHARED_BYTES = 96 << 10  # of a program; every GPU since sm_80 has at least 99 KiB


@dataclass(frozen=True, kw_only=True)
class DecodeTile:
    """A program's share: `rows` outputs, `slots` warps that split the columns, `tokens` inputs.

    `units` of packed codes are looked up per step, row and warp; loads run `stages` - 1 steps
    ahead. `registers` caps what a thread takes: at 128, two programs of eight warps fit together.
    """

    slots: int
    rows: int
    tokens: int
    units: int
    stages: int
    registers: int


@dataclass(frozen=True, kw_only=True)
class BlockTile:
    """A program's share of a dense weight: `rows`, so many `columns` at a time, on `warps`."""

    rows: int
    columns: int
    warps: int


DEQUANTIZE_UNITS = BlockTile(rows=8, columns=512, warps=4)
DEQUANTIZE_ANY = BlockTile(rows=4, columns=256, warps=4)
TABLE_GRAD = BlockTile(rows=4, columns=256, warps=4)

#: By padded tokens: rows, columns per step of a warp, stages, registers. Chosen from what they
#: compile to (no spills, no weight in shared memory), not yet from measurements.
_COMPILED = {
    1: (16, 256, 3, 128),
    8: (16, 128, 3, 128),
    16: (32, 128, 3, 128),
    32: (32, 64, 3, 255),
    64: (32, 32, 3, 255),
}
#: By GPU generation, the major number of the compute capability.
_DECODE = {8: _COMPILED, 9: _COMPILED}


def decode_tile(
    bits: int, tokens: int, columns: int, width: int, generation: int, *, hashed: bool = False
) -> DecodeTile:
    """The tile for `tokens` inputs of `columns` columns in groups of `width`.

    generation: major number of the compute capability; a newer one than listed gets the newest.
    """
    table = _DECODE[min(max(_DECODE), generation)]
    padded = next(size for size in table if size >= tokens)
    rows, step, stages, registers = table[padded]
    if hashed:  # no codes are on their way while others are looked up, so short steps cost nothing
        step, registers = 0, 255
    units = max(4, step // UNIT_CODES[bits])
    read = units * UNIT_CODES[bits] * (2 * padded + rows * bits // 8)  # bytes of a step of a warp
    slots = _MOST_SLOTS
    while slots > 1 and not (
        _shares_tables(columns, width, slots) and slots * read * (stages - 1) <= _SHARED_BYTES
    ):
        slots //= 2
    return DecodeTile(
        slots=slots,
        rows=rows,
        tokens=max(8, padded),
        units=units,
        stages=stages,
        registers=registers,
    )


def table_span(columns: int, width: int, slots: int) -> int:
    """Consecutive columns of one warp that share a table."""
    return min(width, columns // slots)


def _shares_tables(columns: int, width: int, slots: int) -> bool:
    """Whether each warp's columns are whole groups, or lie in one group, and start at a unit."""
    share, remainder = divmod(columns, slots)
    aligned = remainder == 0 and share % ALIGNMENT == 0
    return aligned and (width % share == 0 or share % width == 0)
