"""Define numba functions that multiply a tile, or look a row up, in vector registers.

`vector_units.py` has the instructions, `steps.py` the decoding. The functions take addresses and
not arrays: unpacking arrays would take longer than the product of a small layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numba import types
from numba.core import cgutils

from .llvm import (
    FLOAT,
    FLOAT_BYTES,
    INT16,
    INT32,
    Value,
    add_up,
    call,
    element,
    load,
    native,
    number,
    store,
    variable,
    vector,
)
from .steps import ENTRY_BYTES, STEP, Codes, copied, entries_of, move, row_key
from .vector_units import VectorUnit, unit_of


@native
def multiply_tile(  # type: ignore[no-untyped-def]
    context, codes, code_stride, table, groups, width, seed, row, x, y, y_stride, unit, bits, kind,
    hashed, rows, tokens
):  # fmt: skip
    """Multiply consecutive tokens with consecutive rows of a sketched weight.

    Columns of a group that do not fill a step of 16 are left out; `add_rest` adds them.

    Args:
        context: Numba's typing context.
        codes: Address of the packed codes of row 0, int64; ignored if hashed.
        code_stride: Bytes from one row of codes to the next, int64.
        table: Address of the tables, [rows, groups, 2^bits], int64.
        groups: Groups of a row, int64.
        width: Columns of a group, int64. If there are several groups and codes are stored, their
            bits are a multiple of 8.
        seed: Seed of the `hash` mapping, int64; ignored unless hashed.
        row: Number of the first row, int64.
        x: Address of the first token, float32 [tokens, columns], int64.
        y: Address of the product of the first token with row 0, float32, int64.
        y_stride: Bytes from a product to that of the next token with the same row, int64.
        unit: Key of the vector unit, a constant.
        bits: Bits of a code, a constant: 2, 3 or 4.
        kind: Kind of table entries, a constant: `float32`, `float16` or `bfloat16`.
        hashed: 1 if codes are hashed, 0 if they are stored, a constant.
        rows: Rows of the tile, a constant.
        tokens: Tokens of the tile, a constant.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sketch, (x, y, y_stride) = sketch_of(arguments, unit, bits, kind, hashed), arguments[7:10]
        shape = rows.literal_value, tokens.literal_value
        emit_tile(builder, sketch, x, y, y_stride, shape)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10, unit, bits, kind, hashed, rows, tokens), generate


@native
def add_rest(  # type: ignore[no-untyped-def]
    context, codes, code_stride, table, groups, width, seed, row, x, y, unit, bits, kind, hashed
):
    """Add the products of a row's columns that `multiply_tile` leaves out, for one token.

    Its arguments have the same meaning.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit_rest(builder, sketch_of(arguments, unit, bits, kind, hashed), *arguments[7:9])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9, unit, bits, kind, hashed), generate


@native
def look_up_steps(  # type: ignore[no-untyped-def]
    context, codes, code_stride, table, groups, width, seed, row, group, step, steps, target, unit,
    bits, kind, hashed
):  # fmt: skip
    """Write dense weights of a row in the dtype of the tables: whole steps of 16 columns.

    The other arguments have the meaning of those of `multiply_tile`.

    Args:
        group: Number of the group, int64.
        step: Number of the first step in the group, int64.
        steps: Number of steps, int64.
        target: Address where to write, int64.
        kind: `float32`, or `raw16` for any dtype of 16 bits.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit_steps(builder, sketch_of(arguments, unit, bits, kind, hashed), *arguments[7:11])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11, unit, bits, kind, hashed), generate


@native
def look_up_rest(  # type: ignore[no-untyped-def]
    context, codes, code_stride, table, groups, width, seed, row, group, target, unit, bits, kind,
    hashed
):  # fmt: skip
    """Write the weights of a group behind its whole steps. See `look_up_steps` for arguments."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sketch = sketch_of(arguments, unit, bits, kind, hashed)
        emit_last_step(builder, sketch, *arguments[7:9])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9, unit, bits, kind, hashed), generate


@dataclass(frozen=True)
class Sketch:
    """Hold where a sketch lies, as int64 values of LLVM (see `multiply_tile`), and its constants.

    `row` is the row where a tile starts.
    """

    codes: Value
    code_stride: Value
    table: Value
    groups: Value
    width: Value
    seed: Value
    row: Value
    unit: VectorUnit
    bits: int
    kind: str
    hashed: int

    def group(self, builder: Any, row: int, group: Value) -> Codes:
        """Return the codes of a group, with its table in registers.

        Args:
            builder: Builder of llvmlite.
            row: Number of the row in the tile.
            group: Number of the group, int64.
        """
        number_of_row = builder.add(self.row, number(row))
        first = builder.mul(group, self.width)
        if self.hashed:
            origin = row_key(builder, self.seed, number_of_row)
        else:
            stream = element(builder, self.codes, number_of_row, self.code_stride)
            bits = builder.mul(first, number(self.bits))
            origin = builder.add(stream, builder.lshr(bits, number(3)))
        at = builder.add(builder.mul(self.groups, number_of_row), group)
        table = element(builder, self.table, at, ENTRY_BYTES[self.kind] << self.bits)
        registers = self.unit.spread(builder, entries_of(builder, table, self.bits, self.kind))
        return Codes(self.unit, self.bits, bool(self.hashed), origin, first, registers)

    def steps(self, builder: Any) -> Value:
        """Return the number of whole steps of a group."""
        return builder.udiv(self.width, number(STEP))

    def rest(self, builder: Any) -> Value:
        """Return the number of columns of a group behind its whole steps."""
        return builder.urem(self.width, number(STEP))


def emit_tile(
    builder: Any, sketch: Sketch, x: Value, y: Value, y_stride: Value, shape: tuple[int, int]
) -> None:
    """Append the instructions of `multiply_tile`. Sums and tables stay in registers.

    `shape` has the rows and tokens of the tile.
    """
    rows, tokens = shape
    floats = vector(FLOAT, sketch.unit.lanes)
    sums = [[zero(builder, floats) for _ in range(tokens)] for _ in range(rows)]
    x_stride = builder.mul(builder.mul(sketch.groups, sketch.width), number(FLOAT_BYTES))
    with cgutils.for_range(builder, sketch.groups) as group:
        codes = [sketch.group(builder, row, group.index) for row in range(rows)]
        start = element(builder, x, codes[0].first, FLOAT_BYTES)
        lines = [element(builder, start, number(token), x_stride) for token in range(tokens)]
        with cgutils.for_range(builder, sketch.steps(builder)) as step:
            column = builder.mul(step.index, number(STEP))
            weights = [[each.weights(builder, step.index)] * tokens for each in codes]
            inputs = [element(builder, line, column, FLOAT_BYTES) for line in lines]
            add_products(builder, weights, inputs, sums)
    for row in range(rows):
        for token in range(tokens):
            total = add_up(builder, builder.load(sums[row][token]))
            store(builder, total, _product(builder, sketch, y, row, number(token), y_stride))


def emit_rest(builder: Any, sketch: Sketch, x: Value, y: Value) -> None:
    """Append the instructions of `add_rest`."""
    steps, rest = sketch.steps(builder), sketch.rest(builder)
    address = element(builder, y, sketch.row, FLOAT_BYTES)
    floats = vector(FLOAT, sketch.unit.lanes)
    total = zero(builder, floats)
    with cgutils.for_range(builder, sketch.groups) as group:
        codes = sketch.group(builder, 0, group.index)
        column = builder.add(codes.first, builder.mul(steps, number(STEP)))
        padded = copied(builder, element(builder, x, column, FLOAT_BYTES), rest, FLOAT, STEP)
        weights = codes.last_weights(builder, steps, rest)
        add_products(builder, [[weights]], [padded], [[total]])
    added = add_up(builder, builder.load(total))
    store(builder, builder.fadd(load(builder, address, FLOAT), added), address)


def emit_steps(
    builder: Any, sketch: Sketch, group: Value, step: Value, steps: Value, target: Value
) -> None:
    """Append the instructions of `look_up_steps`."""
    codes = sketch.group(builder, 0, group)
    size = STEP * ENTRY_BYTES[sketch.kind]
    with cgutils.for_range(builder, steps) as loop:
        weights = codes.weights(builder, builder.add(step, loop.index))
        _write(builder, weights, element(builder, target, loop.index, size), sketch.kind)


def emit_last_step(builder: Any, sketch: Sketch, group: Value, target: Value) -> None:
    """Append the instructions of `look_up_rest`."""
    codes = sketch.group(builder, 0, group)
    steps, rest = sketch.steps(builder), sketch.rest(builder)
    kind = INT16 if sketch.kind == "raw16" else FLOAT
    padded = copied(builder, target, number(0), kind, STEP)
    _write(builder, codes.last_weights(builder, steps, rest), padded, sketch.kind)
    move(builder, padded, target, rest, kind)


def add_products(
    builder: Any, weights: list[list[list[Value]]], inputs: list[Value], sums: list[list[Value]]
) -> None:
    """Add the products of a step to the sums of every row and token.

    Args:
        builder: Builder of llvmlite.
        weights: Weights by row and token, in vectors.
        inputs: Address of the inputs of every token.
        sums: Variables, by row and token.
    """
    floats = weights[0][0][0].type
    for part in range(len(weights[0][0])):
        for token, line in enumerate(inputs):
            address = element(builder, line, number(part * floats.count), FLOAT_BYTES)
            some = load(builder, address, floats)
            for of_row, totals in zip(weights, sums, strict=True):
                arguments = [of_row[token][part], some, builder.load(totals[token])]
                total = call(builder, f"llvm.fma.v{floats.count}f32", floats, arguments)
                builder.store(total, totals[token])


def _product(
    builder: Any, sketch: Sketch, y: Value, row: int, token: Value, y_stride: Value
) -> Value:
    """Return the address of the product of a row of the tile with a token of the tile."""
    line = element(builder, y, token, y_stride)
    return element(builder, line, builder.add(sketch.row, number(row)), FLOAT_BYTES)


def _write(builder: Any, weights: list[Value], address: Value, kind: str) -> None:
    """Write the weights of a step as float32, or their low 16 bits."""
    for part, found in enumerate(weights):
        lanes, value = found.type.count, found
        if kind == "raw16":
            bits = builder.bitcast(found, vector(INT32, lanes))
            value = builder.trunc(bits, vector(INT16, lanes))
        store(builder, value, element(builder, address, number(part * lanes), ENTRY_BYTES[kind]))


def sketch_of(arguments: Any, unit: Any, bits: Any, kind: Any, hashed: Any) -> Sketch:
    """Return the sketch that the first seven arguments and the constants of a function describe."""
    codes, code_stride, table, groups, width, seed, row = arguments[:7]
    return Sketch(
        codes=codes,
        code_stride=code_stride,
        table=table,
        groups=groups,
        width=width,
        seed=seed,
        row=row,
        unit=unit_of(unit.literal_value),
        bits=bits.literal_value,
        kind=kind.literal_value,
        hashed=hashed.literal_value,
    )


def zero(builder: Any, kind: Any) -> Value:
    """Return a variable that holds zeros."""
    made = variable(builder, kind)
    builder.store(kind(None), made)
    return made
