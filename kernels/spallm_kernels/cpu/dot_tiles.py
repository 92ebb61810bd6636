"""Define a numba function that multiplies bfloat16 weights by AVX512-BF16's dot products.

One instruction multiplies 32 weights with a token and adds the products to 16 sums in float32. Each
token has tables of its own, and the tokens of a tile share the packed codes, which are unpacked
once.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils

from .bfloat16_steps import DWORDS, STEP_BYTES, WORDS, BFloat16Sketch, look_up
from .llvm import (
    FLOAT,
    FLOAT_BYTES,
    INT64,
    Value,
    add_up,
    call,
    element,
    load,
    native,
    number,
    store,
    vector,
)
from .tiles import zero

#: Numbers that describe a token: addresses of its tables, of its inputs, and of its product with
#: row 0.
FIELDS = 3
NUMBER_BYTES = 8
_SUMS = vector(FLOAT, 16)


@native
def multiply_dot_tile(  # type: ignore[no-untyped-def]
    context, codes, code_stride, groups, width, row, last, places, bits, kind, rows, tokens
):  # fmt: skip
    """Multiply tokens, each with tables of its own, with consecutive rows of shared codes.

    Args:
        context: Numba's typing context.
        codes: Address of the packed codes of row 0, int64.
        code_stride: Bytes from one row of codes to the next, int64.
        groups: Groups of a row, int64.
        width: Columns of a group, int64.
        row: Number of the first row, int64.
        last: Number of the last row to multiply, int64. It stands for those behind it.
        places: Address of int64 [tokens, FIELDS], int64. Inputs are blocks of one token as `pack`
            writes them.
        bits: Bits of a code, a constant: 2, 3 or 4.
        kind: Kind of table entries, a constant: `bfloat16` or `rounded_bfloat16`.
        rows: Rows of the tile, a constant.
        tokens: Tokens of the tile, a constant.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sketch = BFloat16Sketch(*arguments[:4], bits.literal_value, kind.literal_value)
        shape = rows.literal_value, tokens.literal_value
        emit_dot_tile(builder, sketch, *arguments[4:7], shape)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, bits, kind, rows, tokens), generate


def emit_dot_tile(
    builder: Any,
    sketch: BFloat16Sketch,
    row: Value,
    last: Value,
    places: Value,
    shape: tuple[int, int],
) -> None:
    """Append the instructions of `multiply_dot_tile`. `shape` has the rows and tokens of the tile.

    Sums and tables stay in registers.
    """
    rows, tokens = shape
    wanted = [builder.add(row, number(index)) for index in range(rows)]
    numbers = [
        builder.select(builder.icmp_signed("<", each, last), each, last) for each in wanted
    ]
    described = [_place(builder, places, token) for token in range(tokens)]
    sums = [[zero(builder, _SUMS) for _ in described] for _ in numbers]
    steps, whole = sketch.all_steps(builder), sketch.whole_steps(builder)
    with cgutils.for_range(builder, sketch.groups) as group:
        streams = [sketch.stream(builder, each, group.index) for each in numbers]
        registers = [
            [sketch.register(builder, table, each, group.index) for table, _, _ in described]
            for each in numbers
        ]
        before = builder.mul(group.index, steps)
        lines = [element(builder, x, before, STEP_BYTES) for _, x, _ in described]

        def add(codes: list[Value], step: Value, last_step: bool) -> None:
            for of_row, registers_of_row, totals in zip(codes, registers, sums, strict=True):
                for register, line, total in zip(registers_of_row, lines, totals, strict=True):
                    weights = look_up(builder, register, of_row)
                    if last_step:
                        weights = sketch.last_weights(builder, weights)
                    some = load(builder, element(builder, line, step, STEP_BYTES), WORDS)
                    builder.store(_dot(builder, weights, some, builder.load(total)), total)

        with cgutils.for_range(builder, whole) as step:
            add([sketch.unpacked(builder, each, step.index) for each in streams], step.index, False)
        with builder.if_then(builder.icmp_signed("<", whole, steps)):
            add([sketch.last_unpacked(builder, each) for each in streams], whole, True)
    for each, totals in zip(numbers, sums, strict=True):
        for (_, _, y), total in zip(described, totals, strict=True):
            product = add_up(builder, builder.load(total))
            store(builder, product, element(builder, y, each, FLOAT_BYTES))


def _place(builder: Any, places: Value, token: int) -> list[Value]:
    """Return the addresses that describe a token of the tile."""
    fields = (number(FIELDS * token + field) for field in range(FIELDS))
    return [load(builder, element(builder, places, at, NUMBER_BYTES), INT64) for at in fields]


def _dot(builder: Any, weights: Value, x: Value, sums: Value) -> Value:
    """Return sums to which the products of pairs of bfloat16 are added."""
    # LLVM 17 and newer take a type that llvmlite does not have, and integers as before.
    pairs = [builder.bitcast(each, DWORDS) for each in (weights, x)]
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _SUMS, [sums, *pairs])
