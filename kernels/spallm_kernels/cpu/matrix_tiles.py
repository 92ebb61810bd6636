"""Define numba functions that multiply bfloat16 weights in the tile registers of Intel AMX.

A tile of a weight is 16 rows of a step of 32 columns. Weights are looked up, written to the cache,
and loaded as tiles. One instruction multiplies a tile with 16 tokens and adds the products to sums
in float32, which stay in tile registers. Compared with multiplying in vector registers, a product
with 8 tokens takes a third of the time.

Some steps are looked up before the first of them is multiplied: a tile that is loaded just after it
has been written waits for the cache. Sums of even and of odd steps are kept apart: an addition to
the same tile waits for the previous one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .bfloat16_steps import STEP_BYTES, WORDS, BFloat16Sketch, look_up
from .llvm import (
    FLOAT,
    FLOAT_BYTES,
    INT8,
    INT64,
    Value,
    call,
    constants,
    element,
    load,
    native,
    number,
    store,
    variable,
    vector,
)
from .packing import TOKENS, transposed
from .steps import move

#: Rows of a tile.
ROWS = 16
#: The most blocks of 16 tokens that are multiplied at once: their sums fill the tile registers.
MOST_BLOCKS = 3
TILE_BYTES = ROWS * STEP_BYTES
#: Tiles of sums of a block: for even steps and for odd ones.
CHAINS = 2
#: Numbers of the tile registers behind those of sums.
_WEIGHTS, _INPUTS = CHAINS * MOST_BLOCKS, CHAINS * MOST_BLOCKS + 1
#: Steps that are looked up at once. Their tiles take 8 KiB of the first-level cache.
_STEPS = 8
#: Layout of the operand of `ldtilecfg`: palette, bytes of a row from byte 16 on, rows from 48 on.
_CONFIG_BYTES, _ROW_BYTES_AT, _ROWS_AT = 64, 16, 48


@native
def configure_tiles(context):  # type: ignore[no-untyped-def]
    """Give the tile registers of this thread 16 rows of 64 bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit_configure(builder)
        return context.get_dummy_value()

    return types.void(), generate


@native
def release_tiles(context):  # type: ignore[no-untyped-def]
    """Empty the tile registers of this thread: the system need not save them any more."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _amx(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@native
def multiply_matrix(  # type: ignore[no-untyped-def]
    context, codes, code_stride, table, groups, width, row, last, x, x_stride, y, y_stride, tokens,
    bits, kind, blocks
):  # fmt: skip
    """Multiply blocks of 16 tokens with 16 consecutive rows of a sketched weight.

    Args:
        context: Numba's typing context.
        codes: Address of the packed codes of row 0, int64.
        code_stride: Bytes from one row of codes to the next, int64.
        table: Address of the tables, [rows, groups, 2^bits], int64.
        groups: Groups of a row, int64.
        width: Columns of a group, int64.
        row: Number of the first row, int64.
        last: Number of the last row to multiply, int64. It stands for those behind it.
        x: Address of the first block as `pack` writes it, int64.
        x_stride: Bytes from a block to the next one, int64.
        y: Address of the product of the first token with row 0, float32, int64.
        y_stride: Bytes from a product to that of the next token with the same row, int64.
        tokens: Tokens that exist, int64.
        bits: Bits of a code, a constant: 2, 3 or 4.
        kind: Kind of table entries, a constant: `bfloat16` or `rounded_bfloat16`.
        blocks: Blocks of tokens, a constant, at most 3.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, code_stride, table, groups, width = arguments[:5]
        described = codes, code_stride, groups, width
        sketch = BFloat16Sketch(*described, bits.literal_value, kind.literal_value)
        emit_multiply(builder, sketch, table, arguments[5:12], blocks.literal_value)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 12, bits, kind, blocks), generate


def emit_configure(builder: Any) -> None:
    """Append the instructions of `configure_tiles`."""
    described = bytearray(_CONFIG_BYTES)
    described[0] = 1
    for tile in range(_INPUTS + 1):
        described[_ROW_BYTES_AT + 2 * tile] = STEP_BYTES
        described[_ROWS_AT + tile] = ROWS
    place = variable(builder, vector(INT8, _CONFIG_BYTES))
    builder.store(constants(INT8, described), place)
    _amx(builder, "ldtilecfg", builder.bitcast(place, INT8.as_pointer()))


def emit_multiply(
    builder: Any, sketch: BFloat16Sketch, table: Value, places: Sequence[Value], blocks: int
) -> None:
    """Append the instructions of `multiply_matrix`. `places` are its arguments from `row` on."""
    row, last, x, x_stride, y, y_stride, tokens = places
    rows = [_smaller(builder, builder.add(row, number(index)), last) for index in range(ROWS)]
    steps, whole = sketch.all_steps(builder), sketch.whole_steps(builder)
    batches = builder.udiv(builder.add(steps, number(_STEPS - 1)), number(_STEPS))
    tiles = _room(builder, _STEPS * ROWS)
    for chain in range(CHAINS * blocks):
        _amx(builder, "tilezero", _tile(chain))
    with cgutils.for_range(builder, sketch.groups) as group:
        streams = [sketch.stream(builder, each, group.index) for each in rows]
        registers = [sketch.register(builder, table, each, group.index) for each in rows]
        with cgutils.for_range(builder, batches) as batch:
            first = builder.mul(batch.index, number(_STEPS))
            count = _smaller(builder, builder.sub(steps, first), number(_STEPS))
            decoded = _smaller(builder, builder.sub(whole, first), number(_STEPS))
            with cgutils.for_range(builder, decoded) as step:
                number_of_step = builder.add(first, step.index)
                target = element(builder, tiles, step.index, TILE_BYTES)
                for index, (stream, register) in enumerate(zip(streams, registers, strict=True)):
                    codes = sketch.unpacked(builder, stream, number_of_step)
                    line = element(builder, target, number(index), STEP_BYTES)
                    store(builder, look_up(builder, register, codes), line)
            with builder.if_then(builder.icmp_signed("<", decoded, count)):
                target = element(builder, tiles, decoded, TILE_BYTES)
                _look_up_last(builder, sketch, streams, registers, target)
            at = builder.add(builder.mul(group.index, steps), first)
            inputs = element(builder, x, at, TILE_BYTES)
            _multiply_steps(builder, tiles, inputs, x_stride, count, blocks)
    for block in range(blocks):
        _write_sums(builder, block, row, last, y, y_stride, tokens)


def _look_up_last(
    builder: Any,
    sketch: BFloat16Sketch,
    streams: Sequence[Value],
    registers: Sequence[Value],
    target: Value,
) -> None:
    """Write the tile of the step behind the whole ones. A loop over rows keeps the code short."""
    place = variable(builder, ir.ArrayType(INT64, ROWS))
    kept_streams, kept_registers = builder.ptrtoint(place, INT64), _room(builder, ROWS)
    for index, (stream, register) in enumerate(zip(streams, registers, strict=True)):
        store(builder, stream, element(builder, kept_streams, number(index), 8))
        store(builder, register, element(builder, kept_registers, number(index), STEP_BYTES))
    with cgutils.for_range(builder, number(ROWS)) as row:
        stream = load(builder, element(builder, kept_streams, row.index, 8), INT64)
        register = load(builder, element(builder, kept_registers, row.index, STEP_BYTES), WORDS)
        weights = look_up(builder, register, sketch.last_unpacked(builder, stream))
        line = element(builder, target, row.index, STEP_BYTES)
        store(builder, sketch.last_weights(builder, weights), line)


def _multiply_steps(
    builder: Any, weights: Value, inputs: Value, x_stride: Value, count: Value, blocks: int
) -> None:
    """Multiply the tiles of steps, of which the first one is even."""

    def multiply(step: Value, chain: int) -> None:
        _load_tile(builder, _WEIGHTS, element(builder, weights, step, TILE_BYTES))
        for block in range(blocks):
            line = element(builder, inputs, number(block), x_stride)
            _load_tile(builder, _INPUTS, element(builder, line, step, TILE_BYTES))
            used = (_tile(tile) for tile in (CHAINS * block + chain, _WEIGHTS, _INPUTS))
            _amx(builder, "tdpbf16ps", *used)

    with cgutils.for_range(builder, builder.udiv(count, number(CHAINS))) as pair:
        for chain in range(CHAINS):
            multiply(builder.add(builder.mul(pair.index, number(CHAINS)), number(chain)), chain)
    with builder.if_then(builder.trunc(count, ir.IntType(1))):
        multiply(builder.sub(count, number(1)), 0)


def _write_sums(
    builder: Any, block: int, row: Value, last: Value, y: Value, y_stride: Value, tokens: Value
) -> None:
    """Write the sums of a block of tokens to each token's line."""
    floats = vector(FLOAT, TOKENS)
    stored = [_room(builder, ROWS) for _ in range(CHAINS)]
    for chain, address in enumerate(stored):
        pointer = builder.inttoptr(address, INT8.as_pointer())
        tile = _tile(CHAINS * block + chain)
        _amx(builder, "tilestored64", tile, pointer, number(STEP_BYTES))
    lines = []
    for index in range(ROWS):
        parts = (element(builder, each, number(index), STEP_BYTES) for each in stored)
        lines.append(builder.fadd(*(load(builder, part, floats) for part in parts)))
    for index, line in enumerate(transposed(builder, lines)):
        store(builder, line, element(builder, stored[0], number(index), STEP_BYTES))
    first = number(TOKENS * block)
    left = _smaller(builder, builder.sub(tokens, first), number(TOKENS))
    rows = builder.add(builder.sub(last, row), number(1))
    whole = builder.icmp_signed(">=", rows, number(ROWS))
    with cgutils.for_range(builder, left) as token:
        source = element(builder, stored[0], token.index, STEP_BYTES)
        target = element(builder, y, builder.add(first, token.index), y_stride)
        target = element(builder, target, row, FLOAT_BYTES)
        with builder.if_else(whole) as (then, otherwise):
            with then:
                store(builder, load(builder, source, floats), target)
            with otherwise:
                move(builder, source, target, rows, FLOAT)


def _room(builder: Any, lines: int) -> Value:
    """Return the address of room for lines of 64 bytes."""
    return builder.ptrtoint(variable(builder, ir.ArrayType(WORDS, lines)), INT64)


def _smaller(builder: Any, one: Value, other: Value) -> Value:
    return builder.select(builder.icmp_signed("<", one, other), one, other)


def _tile(register: int) -> Value:
    return ir.Constant(INT8, register)


def _load_tile(builder: Any, register: int, address: Value) -> None:
    pointer = builder.inttoptr(address, INT8.as_pointer())
    _amx(builder, "tileloadd64", _tile(register), pointer, number(STEP_BYTES))


def _amx(builder: Any, name: str, *arguments: Value) -> None:
    """Append an instruction of AMX."""
    call(builder, f"llvm.x86.{name}", ir.VoidType(), arguments)
