"""Append the LLVM instructions that decode a step: 16 weights of a row, in the order of columns.

The codes of a step are 2 x bits bytes. One or two 32-bit words cover them, and every lane shifts
its word by an amount of its own. Bits above a code stay in the lane, because looking up ignores
them:

    bits  words at bytes  shift of code c
    4     0, 4            4 c,  4 (c - 8)
    3     0, 2            3 c,  8 + 3 (c - 8)
    2     0               2 c

With the `hash` mapping, codes are hashed from row, column and seed (see `hashing.py`).

Nothing is read beyond the end of a row. In a last step with fewer than 16 columns, bytes are copied
one by one, and the weights that do not exist are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from .hashing import MULTIPLIERS, SHIFTS
from .llvm import (
    FLOAT,
    HALF,
    INT8,
    INT16,
    INT32,
    INT64,
    Value,
    constants,
    element,
    load,
    number,
    shuffle,
    splat,
    store,
    variable,
    vector,
)
from .vector_units import VectorUnit

STEP = 16  # columns
#: Offsets of the words of a step in bytes, by bits of a code.
_WORDS = {2: (0,), 3: (0, 2), 4: (0, 4)}
#: Bytes of a table entry, by kind. `raw16` is any dtype of 16 bits that is moved and not computed
#: with. The last two are float32 that is rounded to 16 bits when it is read.
ENTRY_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "raw16": 2,
    "rounded_float16": 4,
    "rounded_bfloat16": 4,
}
_ROUNDED = "rounded_"
_BFLOAT16_NAN = 0x7FC0


@dataclass(frozen=True)
class Codes:
    """Decode the weights of a group of a row.

    Attributes:
        unit: Vector unit.
        bits: Bits of a code.
        hashed: Whether codes are hashed.
        origin: Address of the group's first byte, or the key of the row, int32, if hashed.
        first: Number of the group's first column, int64.
        registers: Registers with the group's table.
    """

    unit: VectorUnit
    bits: int
    hashed: bool
    origin: Value
    first: Value
    registers: list[Value]

    def weights(self, builder: Any, step: Value) -> list[Value]:
        """Return the 16 weights of a step, in vectors of the unit's lanes.

        Args:
            builder: Builder of llvmlite.
            step: Number of the step in the group, int64.
        """
        return self.look_up(builder, self.unpacked(builder, step))

    def unpacked(self, builder: Any, step: Value) -> list[Value]:
        """Return the codes of a step in the low bits of the lanes of int32 vectors.

        Args:
            builder: Builder of llvmlite.
            step: Number of the step in the group, int64.
        """
        if self.hashed:
            return self._hashed(builder, step)
        start = self._start(builder, step)
        words = [
            load(builder, element(builder, start, number(at), 1), INT32) for at in _WORDS[self.bits]
        ]
        return _shifted(builder, self.unit.lanes, self.bits, words)

    def look_up(self, builder: Any, unpacked: list[Value]) -> list[Value]:
        """Return the weights of codes, in float32 vectors.

        Args:
            builder: Builder of llvmlite.
            unpacked: Codes in the low bits of the lanes of int32 vectors.
        """
        return [self.unit.look_up(builder, self.registers, part) for part in unpacked]

    def last_weights(self, builder: Any, step: Value, columns: Value) -> list[Value]:
        """Return the weights of a last step that has fewer than 16 columns, followed by zeros.

        Args:
            builder: Builder of llvmlite.
            step: Number of the step in the group, int64.
            columns: Columns of the step, int64, 1 to 15.
        """
        if self.hashed:
            found = self._hashed(builder, step)
        else:
            bits = builder.mul(columns, number(self.bits))
            count = builder.lshr(builder.add(bits, number(7)), number(3))
            start = self._start(builder, step)
            stream = load(builder, copied(builder, start, count, INT8, 8), INT64)
            words = [
                builder.trunc(builder.lshr(stream, number(8 * at)), INT32)
                for at in _WORDS[self.bits]
            ]
            found = _shifted(builder, self.unit.lanes, self.bits, words)
        zeros = constants(FLOAT, [0.0] * self.unit.lanes)
        masks = _column_masks(builder, self.unit.lanes, columns)
        return [
            builder.select(mask, weights, zeros)
            for mask, weights in zip(masks, self.look_up(builder, found), strict=True)
        ]

    def _start(self, builder: Any, step: Value) -> Value:
        """Return the address of the first byte of a step."""
        return builder.add(self.origin, builder.mul(step, number(STEP * self.bits // 8)))

    def _hashed(self, builder: Any, step: Value) -> list[Value]:
        """Return the hashed codes of a step in the low bits of their lanes."""
        lanes = self.unit.lanes
        first = builder.add(self.first, builder.mul(step, number(STEP)))
        columns = splat(builder, builder.trunc(first, INT32), lanes)
        key = splat(builder, self.origin, lanes)
        found = []
        for start in range(0, STEP, lanes):
            numbers = builder.add(columns, constants(INT32, range(start, start + lanes)))
            found.append(_mix(builder, builder.xor(numbers, key)))
        return found


def entries_of(builder: Any, address: Value, bits: int, kind: str) -> Value:
    """Return a table as a vector of 2^bits float32 elements; `raw16` in their low halves.

    Args:
        builder: Builder of llvmlite.
        address: Address of the table.
        bits: Bits of a code.
        kind: Kind of an entry, see `ENTRY_BYTES`.
    """
    count = 1 << bits
    if kind == "float32":
        return load(builder, address, vector(FLOAT, count))
    if kind.startswith(_ROUNDED):
        found = load(builder, address, vector(FLOAT, count))
        kind = kind.removeprefix(_ROUNDED)
        return _widened(builder, rounded_entries(builder, found, kind), kind)
    stored = HALF if kind == "float16" else INT16
    return _widened(builder, load(builder, address, vector(stored, count)), kind)


def rounded_entries(builder: Any, entries: Value, kind: str) -> Value:
    """Return float32 entries in a dtype of 16 bits, rounded to the nearest value, ties to even.

    Args:
        builder: Builder of llvmlite.
        entries: A float32 vector.
        kind: `float16` or `bfloat16`; the latter is returned as int16.
    """
    count = entries.type.count
    if kind == "float16":
        return builder.fptrunc(entries, vector(HALF, count))
    bits = builder.bitcast(entries, vector(INT32, count))
    high = builder.lshr(bits, constants(INT32, [16] * count))
    last = builder.and_(high, constants(INT32, [1] * count))
    carried = builder.add(builder.add(bits, last), constants(INT32, [0x7FFF] * count))
    rounded = builder.lshr(carried, constants(INT32, [16] * count))
    # A carry could turn a NaN into a number, and its upper bits alone could be those of infinity.
    finite = builder.fcmp_ordered("ord", entries, entries)
    kept = builder.select(finite, rounded, constants(INT32, [_BFLOAT16_NAN] * count))
    return builder.trunc(kept, vector(INT16, count))


def _widened(builder: Any, entries: Value, kind: str) -> Value:
    """Return `float16` entries, or the bits of other ones, as float32; `raw16` in low halves."""
    floats = vector(FLOAT, entries.type.count)
    if kind == "float16":
        return builder.fpext(entries, floats)
    wide = builder.zext(entries, vector(INT32, floats.count))
    if kind == "bfloat16":
        wide = builder.shl(wide, constants(INT32, [16] * floats.count))
    return builder.bitcast(wide, floats)


def copied(builder: Any, source: Value, count: Value, kind: Any, most: int) -> Value:
    """Return the address of a copy that is followed by zeros.

    Args:
        builder: Builder of llvmlite.
        source: Address of the elements.
        count: Number of elements, int64.
        kind: Type of an element.
        most: Elements of the copy.
    """
    array = ir.ArrayType(kind, most)
    place = variable(builder, array)
    builder.store(array(None), place)
    target = builder.ptrtoint(place, INT64)
    move(builder, source, target, count, kind)
    return target


def move(builder: Any, source: Value, target: Value, count: Value, kind: Any) -> None:
    """Copy elements one by one, from one address to another."""
    size = kind.width // 8 if isinstance(kind, ir.IntType) else 4
    with cgutils.for_range(builder, count) as loop:
        value = load(builder, element(builder, source, loop.index, size), kind)
        store(builder, value, element(builder, target, loop.index, size))


def row_key(builder: Any, seed: Value, row: Value) -> Value:
    """Return the key of a row, int32, from which and a column a code is hashed.

    Args:
        builder: Builder of llvmlite.
        seed: Seed of the mapping, int64.
        row: Number of the row in the module, int64.
    """
    mixed = _mix(builder, builder.trunc(seed, INT32))
    return _mix(builder, builder.xor(builder.trunc(row, INT32), mixed))


def _shifted(builder: Any, lanes: int, bits: int, words: list[Value]) -> list[Value]:
    """Return the codes of a step in the low bits of their lanes."""
    found = []
    for start in range(0, STEP, lanes):
        places = [_place(bits, code) for code in range(start, start + lanes)]
        if len({word for word, _ in places}) == 1:
            spread = splat(builder, words[places[0][0]], lanes)
        else:
            low, high = (splat(builder, word, lanes) for word in words)
            sources = [lane + lanes * word for lane, (word, _) in enumerate(places)]
            spread = shuffle(builder, low, sources, high)
        found.append(builder.lshr(spread, constants(INT32, [shift for _, shift in places])))
    return found


def _place(bits: int, code: int) -> tuple[int, int]:
    """Return which word of a step holds a code, and by how many bits the word must be shifted."""
    first = code * bits
    word = 1 if len(_WORDS[bits]) == 2 and code >= STEP // 2 else 0
    return word, first - 8 * _WORDS[bits][word]


def _column_masks(builder: Any, lanes: int, columns: Value) -> list[Value]:
    """Return which lanes of a step have one of its first `columns` columns, in vectors of bits."""
    limit = splat(builder, builder.trunc(columns, INT32), lanes)
    return [
        builder.icmp_signed("<", constants(INT32, range(start, start + lanes)), limit)
        for start in range(0, STEP, lanes)
    ]


def _mix(builder: Any, value: Value) -> Value:
    """Return `hashing.mix` of an int32 or of a vector of them."""

    def constant(number: int) -> Value:
        if isinstance(value.type, ir.VectorType):
            return constants(INT32, [number] * value.type.count)
        return ir.Constant(INT32, number)

    for shift, factor in zip(SHIFTS, (*MULTIPLIERS, None), strict=True):
        value = builder.xor(value, builder.lshr(value, constant(shift)))
        if factor is not None:
            value = builder.mul(value, constant(factor))
    return value
