"""Append the LLVM instructions that decode 32 bfloat16 weights of a row, in AVX-512.

A table of up to 16 entries of 16 bits fills half a register or less, and `vpermw` looks up 32 codes
at once. The codes of 32 columns are 4 x bits bytes. All of them are loaded into every 64 or 128
bits of a register, and each 16-bit lane shifts its word by an amount of its own. Bits above a code
stay in the lane, because looking up ignores them:

    bits  a lane's word           shift         column of lane j
    4     word j % 8              4 (j // 8)    4 (j % 8) + j // 8
    3     bytes from 3 j // 8 on  3 j % 8       j
    2     word j % 4              2 (j // 4)    8 (j % 4) + j // 4

For 2 and 4 bits, no word has to be moved, so the weights are not in the order of columns. The
inputs are brought into the same order, once for all rows.

Nothing is read beyond the end of a row. In a last step with fewer than 32 columns, bytes are copied
one by one, and the weights that do not exist are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from .llvm import (
    FLOAT,
    INT8,
    INT16,
    INT32,
    INT64,
    Value,
    call,
    constants,
    element,
    load,
    number,
    shuffle,
    splat,
    vector,
)
from .steps import ENTRY_BYTES, copied, rounded_entries

WIDE_STEP = 32  # columns
WORDS = vector(INT16, WIDE_STEP)
DWORDS = vector(INT32, WIDE_STEP // 2)
WORD_BYTES = 2
STEP_BYTES = WORD_BYTES * WIDE_STEP
#: Kinds of entries (see `steps.py`) that are bfloat16 in registers.
KINDS = ("bfloat16", "rounded_bfloat16")


def lane_columns(bits: int) -> list[int]:
    """Return the column of each lane of a step."""
    words = {4: 8, 3: 1, 2: 4}[bits]
    return [WIDE_STEP // words * (lane % words) + lane // words for lane in range(WIDE_STEP)]


@dataclass(frozen=True)
class BFloat16Sketch:
    """Hold where a sketch lies, as int64 values of LLVM, and its constants.

    Attributes:
        codes: Address of the packed codes of row 0.
        code_stride: Bytes from one row of codes to the next.
        groups: Groups of a row.
        width: Columns of a group. If there are several groups, their bits are a multiple of 8.
        bits: Bits of a code: 2, 3 or 4.
        kind: Kind of table entries, one of `KINDS`.
    """

    codes: Value
    code_stride: Value
    groups: Value
    width: Value
    bits: int
    kind: str

    def whole_steps(self, builder: Any) -> Value:
        """Return the number of whole steps of a group."""
        return builder.udiv(self.width, number(WIDE_STEP))

    def all_steps(self, builder: Any) -> Value:
        """Return the number of steps of a group, with a last one that may have fewer columns."""
        return builder.udiv(builder.add(self.width, number(WIDE_STEP - 1)), number(WIDE_STEP))

    def stream(self, builder: Any, row: Value, group: Value) -> Value:
        """Return the address of the first byte of a group's codes."""
        bits = builder.mul(builder.mul(group, self.width), number(self.bits))
        start = element(builder, self.codes, row, self.code_stride)
        return builder.add(start, builder.lshr(bits, number(3)))

    def register(self, builder: Any, table: Value, row: Value, group: Value) -> Value:
        """Return copies of a table that fill a register, given the address of row 0's first one."""
        count = 1 << self.bits
        at = builder.add(builder.mul(row, self.groups), group)
        address = element(builder, table, at, ENTRY_BYTES[self.kind] << self.bits)
        if self.kind == "bfloat16":
            entries = load(builder, address, vector(INT16, count))
        else:
            found = load(builder, address, vector(FLOAT, count))
            entries = rounded_entries(builder, found, "bfloat16")
        return shuffle(builder, entries, [lane % count for lane in range(WIDE_STEP)])

    def unpacked(self, builder: Any, stream: Value, step: Value) -> Value:
        """Return the codes of a whole step in the low bits of 16-bit lanes."""
        at = element(builder, stream, step, WIDE_STEP * self.bits // 8)
        return _unpacked(builder, at, self.bits)

    def last_unpacked(self, builder: Any, stream: Value) -> Value:
        """Return the codes of the step behind the whole ones, which are followed by zeros."""
        at = element(builder, stream, self.whole_steps(builder), WIDE_STEP * self.bits // 8)
        bits = builder.mul(builder.urem(self.width, number(WIDE_STEP)), number(self.bits))
        count = builder.lshr(builder.add(bits, number(7)), number(3))
        return _unpacked(builder, copied(builder, at, count, INT8, 16), self.bits)

    def last_weights(self, builder: Any, weights: Value) -> Value:
        """Return the weights of the step behind the whole ones, with 0 for those not there."""
        rest = builder.trunc(builder.urem(self.width, number(WIDE_STEP)), INT16)
        limit = splat(builder, rest, WIDE_STEP)
        exists = builder.icmp_unsigned("<", constants(INT16, lane_columns(self.bits)), limit)
        return builder.select(exists, weights, WORDS(None))


def look_up(builder: Any, register: Value, unpacked: Value) -> Value:
    """Return the entries for 32 codes."""
    return call(builder, "llvm.x86.avx512.permvar.hi.512", WORDS, [register, unpacked])


def _unpacked(builder: Any, address: Value, bits: int) -> Value:
    """Return 32 codes in the low bits of 16-bit lanes."""
    lanes = range(WIDE_STEP)
    if bits == 4:
        loaded = load(builder, address, vector(INT32, 4))
        words = builder.bitcast(shuffle(builder, loaded, [0, 1, 2, 3] * 4), WORDS)
        return builder.lshr(words, constants(INT16, [4 * (lane // 8) for lane in lanes]))
    eight = splat(builder, load(builder, address, INT64), 8)
    if bits == 2:
        words = builder.bitcast(eight, WORDS)
        return builder.lshr(words, constants(INT16, [2 * (lane // 4) for lane in lanes]))
    last = splat(builder, load(builder, element(builder, address, number(8), 1), INT32), 16)
    is_last = constants(ir.IntType(1), [lane % 4 == 2 for lane in range(16)])
    twelve = builder.select(is_last, last, builder.bitcast(eight, DWORDS))
    # Bytes are moved within their 128 bits, each of which has all codes.
    starts = [16 * (lane // 8) + 3 * lane // 8 for lane in lanes]
    moved = [byte for start in starts for byte in (start, start + 1)]
    found = shuffle(builder, builder.bitcast(twelve, vector(INT8, STEP_BYTES)), moved)
    words = builder.bitcast(found, WORDS)
    return builder.lshr(words, constants(INT16, [3 * lane % 8 for lane in lanes]))
