"""Choose tiles: how much of a layer one program of each kernel takes, per GPU generation.

Nothing is searched for at run time. `benchmarks/gpu/tune.py` measures the alternatives on a device;
better tiles that it finds belong here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .ptx import UNIT_CODES

#: The most tokens that are decoded by default; for more, a dense weight should be faster.
DECODE_TOKENS = 64
#: The same for hashed codes: they cost sixteen instructions per weight, better spent only once.
HASHED_DECODE_TOKENS = 16
#: The same without assembly, where a weight takes 1.5 to 4.5 times as many instructions. Not
#: measured.
PORTABLE_DECODE_TOKENS = 16
#: For lookups in whole units, the columns of a group must be a multiple of this.
ALIGNMENT = 32


@dataclass(frozen=True, kw_only=True)
class DecodeTile:
    """Describe a program's share: `rows` outputs, `slots` warps, `tokens` inputs.

    The warps split the columns. A warp looks up `columns` codes of each row per step; loads run
    `stages` - 1 steps ahead. `registers` limits the registers of a thread. With `quads`, a thread
    reads four neighbouring units of packed codes, 16 bytes at a time.
    """

    slots: int
    rows: int
    tokens: int
    columns: int
    stages: int
    registers: int
    quads: bool = False


@dataclass(frozen=True, kw_only=True)
class BlockTile:
    """Describe a program's share of a dense weight: `rows`, `columns` at a time, on `warps`."""

    rows: int
    columns: int
    warps: int


DEQUANTIZE_UNITS = BlockTile(rows=8, columns=512, warps=4)
DEQUANTIZE_ANY = BlockTile(rows=4, columns=256, warps=4)
TABLE_GRAD = BlockTile(rows=1, columns=128, warps=1)


class _Shape(NamedTuple):
    slots: int
    rows: int
    columns: int
    stages: int
    registers: int
    quads: bool = False


#: By bits and padded tokens, measured on an H100 with Triton 3.6 over layers of 4096 to 28672
#: columns (1,586 tiles). With quads, 3 bits take 0.6 times as long for one token: without
#: them a thread's unit is three words, which one load cannot read.
_MEASURED = {
    4: {
        1: _Shape(4, 16, 256, 3, 168),
        8: _Shape(4, 16, 256, 3, 96),
        16: _Shape(4, 32, 256, 3, 168),
        32: _Shape(4, 16, 128, 3, 255),
        64: _Shape(4, 32, 64, 3, 255),
    },
    3: {
        1: _Shape(4, 16, 512, 2, 128, quads=True),
        8: _Shape(4, 32, 512, 3, 192, quads=True),
        16: _Shape(4, 32, 512, 2, 168, quads=True),
        32: _Shape(4, 32, 128, 3, 168),
        64: _Shape(4, 32, 128, 3, 255),
    },
    2: {
        1: _Shape(4, 16, 256, 3, 128),
        8: _Shape(4, 32, 256, 3, 128),
        16: _Shape(4, 32, 256, 3, 128),
        32: _Shape(4, 32, 128, 3, 255),
        64: _Shape(4, 32, 128, 3, 255),
    },
}
#: Used instead of quads if columns or rows are not a whole number of quads.
_UNALIGNED = _Shape(8, 16, 256, 1, 128)
#: Hashed codes need no loads that run ahead, so short steps cost nothing.
_HASHED = {1: 16, 8: 16, 16: 32}  # rows by padded tokens
#: Chosen from the compiled code: no register is spilled on the GPUs of `test_portable.py`.
_PORTABLE = _Shape(4, 16, 128, 1, 255)
#: Shared memory that a program may use, in bytes. Every GPU since 8.0 has 99 KiB; some have more.
_SHARED_BYTES = 96 << 10
_MORE_SHARED_BYTES = {9: 224 << 10, 10: 224 << 10}  # by the major compute capability


def decode_tile(
    bits: int,
    tokens: int,
    columns: int,
    width: int,
    generation: int,
    *,
    hashed: bool = False,
    aligned: bool = True,
) -> DecodeTile:
    """Return the tile of the decode kernel.

    Args:
        bits: Bits of a code, 2 to 4.
        tokens: Number of inputs.
        columns: Columns of the layer.
        width: Columns of a group.
        generation: Major number of the compute capability, which says how much shared memory
            there is.
        hashed: Whether codes are computed, not stored.
        aligned: Whether rows of packed codes are whole multiples of 16 bytes.

    Returns:
        The tile.
    """
    padded = next(size for size in _MEASURED[bits] if size >= tokens)
    shape = _MEASURED[bits][padded]
    if hashed:
        rows = _HASHED.get(padded, 32)
        shape = _Shape(8, rows, 4 * UNIT_CODES[bits], 3, 255)
    elif shape.quads and not (aligned and _takes_quads(bits, columns, width, shape.slots)):
        shape = _UNALIGNED
    step_bytes = shape.columns * (2 * padded + shape.rows * bits // 8)  # of a warp
    most = _MORE_SHARED_BYTES.get(generation, _SHARED_BYTES)
    slots = shape.slots
    while slots > 1 and not (
        _shares_tables(columns, width, slots) and slots * step_bytes * (shape.stages - 1) <= most
    ):
        slots //= 2
    return DecodeTile(**shape._replace(slots=slots)._asdict(), tokens=max(8, padded))


def block_tokens(tokens: int, experts: int) -> int:
    """Return how many tokens of an expert a program should take, of at most DECODE_TOKENS.

    Codes are looked up once per block, so twice the mean fits most experts in one block. If few
    experts have a token, most of them have a single one. Not measured.

    Args:
        tokens: Tokens of all experts.
        experts: Number of experts.
    """
    if 4 * tokens <= experts:
        return 1
    return min(DECODE_TOKENS, max(8, 2 * -(-tokens // experts)))


def set_block_tokens(tokens: int, sets: int, most: int) -> int:
    """Return how many tokens of a set a program should take.

    The sets of tokens are unknown. One set may have all tokens, so a block takes 16 even if most
    sets should have fewer: that costs a tenth more than 8. Not measured with several sets.

    Args:
        tokens: Tokens of all sets.
        sets: Number of sets.
        most: Most tokens of a block.
    """
    if tokens == 1:
        return 1
    return min(most, max(8, min(16, tokens), 2 * -(-tokens // sets)))


#: For sums of inputs by table entry, by padded tokens: columns of a step, and registers. Measured
#: on an H100 over 39 tiles.
_SUMS = {8: (128, 128), 16: (128, 168), 32: (64, 255)}


def sums_tile(
    bits: int, tokens: int, columns: int, width: int, *, hashed: bool = False
) -> DecodeTile:
    """Return the tile of `entry_sums.py`. Each row has 2^bits lines, of which a program takes 64.

    Args:
        bits: Bits of a code, 2 to 4.
        tokens: Number of inputs.
        columns: Columns of the layer.
        width: Columns of a group.
        hashed: Whether codes are computed, which takes registers.

    Returns:
        The tile. With 2 bits it has 32 lines, which need fewer registers.
    """
    padded = next((size for size in _SUMS if size >= tokens), max(_SUMS))
    step, registers = _SUMS[padded]
    slots = 4
    while slots > 1 and not _shares_tables(columns, width, slots):
        slots //= 2
    return DecodeTile(
        slots=slots,
        rows={4: 4, 3: 8, 2: 8}[bits],
        tokens=padded,
        columns=max(step, 4 * UNIT_CODES[bits]),
        stages=3,
        registers=255 if hashed else registers,
    )


#: By bits: so many blocks take no longer than the sums of a few tokens. This and the number 52 were
#: measured on an H200, for 2 to 256 tokens.
_FEW_BLOCKS = {4: 6, 3: 2, 2: 2}


def most_set_blocks(bits: int, tokens: int) -> int:
    """Return the most blocks of one set each for which looking up weights is the faster way.

    Looking up costs as much per block, whatever the number of its tokens; sums by entry cost as
    much per token, whatever its set.

    Args:
        bits: Bits of a code, 2 to 4.
        tokens: Number of inputs.
    """
    return max(_FEW_BLOCKS[bits], tokens * 2**bits // 52)


def portable_decode_tile(tokens: int, columns: int, width: int) -> DecodeTile:
    """Return the tile of the decode kernel without assembly, for any GPU.

    It needs at most 16 KiB of shared memory for 16 tokens. `tl.gather` aborts the compiler if a
    warp's tables have fewer entries than the warp has threads, 64 on some AMD GPUs: 16 rows of 2
    bits have just as many. The matrix instructions of AMD GPUs take 16 tokens or more.

    Args:
        tokens: Number of inputs.
        columns: Columns of the layer.
        width: Columns of a group.

    Returns:
        The tile.
    """
    shape = _PORTABLE
    slots = shape.slots
    while slots > 1 and not _shares_tables(columns, width, slots):
        slots //= 2
    padded = max(PORTABLE_DECODE_TOKENS, 1 << (tokens - 1).bit_length())
    return DecodeTile(**shape._replace(slots=slots)._asdict(), tokens=padded)


def table_span(columns: int, width: int, slots: int) -> int:
    """Return how many consecutive columns of one warp share a table."""
    return min(width, columns // slots)


def _takes_quads(bits: int, columns: int, width: int, slots: int) -> bool:
    return (
        _shares_tables(columns, width, slots)
        and table_span(columns, width, slots) % (4 * UNIT_CODES[bits]) == 0
    )


def _shares_tables(columns: int, width: int, slots: int) -> bool:
    """Return whether a warp's columns start at a unit and are whole groups, or lie in one."""
    share, remainder = divmod(columns, slots)
    aligned = remainder == 0 and share % ALIGNMENT == 0
    return aligned and (width % share == 0 or share % width == 0)
