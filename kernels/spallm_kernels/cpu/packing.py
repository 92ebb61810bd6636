"""Define a numba function that brings bfloat16 inputs into the order in which AMX reads them.

Blocks of 16 tokens are written as tiles. A tile has the inputs of 32 columns, in the order in which
`bfloat16_steps.py` decodes weights, as pairs: the first pairs of all tokens, then their second
pairs, and so on.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .bfloat16_steps import DWORDS, STEP_BYTES, WIDE_STEP, WORD_BYTES, WORDS, lane_columns
from .llvm import (
    INT16,
    INT64,
    Value,
    element,
    load,
    native,
    number,
    shuffle,
    store,
    variable,
)
from .steps import move

#: Tokens of a block.
TOKENS = 16


@native
def pack(context, x, exist, groups, width, target, bits):  # type: ignore[no-untyped-def]
    """Write the inputs of a block of 16 tokens as tiles.

    Args:
        context: Numba's typing context.
        x: Address of the first token, bfloat16 [tokens, groups, width], int64.
        exist: Tokens that exist, int64. The others become zeros.
        groups: Groups of a row, int64.
        width: Columns of a group, int64. Behind them, zeros fill the last step.
        target: Address where to write, bfloat16 [groups, steps, 16 pairs, 16 tokens, 2], int64.
        bits: Bits of a code, a constant.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit_pack(builder, arguments[:5], bits.literal_value)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, bits), generate


def emit_pack(builder: Any, arguments: Any, bits: int) -> None:
    """Append the instructions of `pack`, given its arguments."""
    x, exist, groups, width, target = arguments
    stride = builder.mul(builder.mul(groups, width), number(WORD_BYTES))
    steps = builder.udiv(builder.add(width, number(WIDE_STEP - 1)), number(WIDE_STEP))
    lines = ir.ArrayType(WORDS, TOKENS)
    place = variable(builder, lines)
    builder.store(lines(None), place)
    first_line = builder.ptrtoint(place, INT64)
    with cgutils.for_range(builder, groups) as group, cgutils.for_range(builder, steps) as step:
        start = builder.mul(step.index, number(WIDE_STEP))
        left = builder.sub(width, start)
        column = builder.add(builder.mul(group.index, width), start)
        source = element(builder, x, column, WORD_BYTES)
        whole = builder.icmp_signed(">=", left, number(WIDE_STEP))
        with cgutils.for_range(builder, exist) as token:
            found = element(builder, source, token.index, stride)
            line = element(builder, first_line, token.index, STEP_BYTES)
            with builder.if_else(whole) as (then, otherwise):
                with then:
                    store(builder, load(builder, found, WORDS), line)
                with otherwise:
                    store(builder, WORDS(None), line)
                    move(builder, found, line, left, INT16)
        ordered = []
        for token in range(TOKENS):
            some = load(builder, element(builder, first_line, number(token), STEP_BYTES), WORDS)
            some = shuffle(builder, some, lane_columns(bits))
            ordered.append(builder.bitcast(some, DWORDS))
        at = builder.add(builder.mul(group.index, steps), step.index)
        written = element(builder, target, at, STEP_BYTES * TOKENS)
        for index, some in enumerate(transposed(builder, ordered)):
            store(builder, some, element(builder, written, number(index), STEP_BYTES))


def transposed(builder: Any, lines: list[Value]) -> list[Value]:
    """Return the columns of a matrix of 16 vectors of 16 elements."""
    size = len(lines)
    columns, distance = list(lines), size // 2
    # A bit of the number of a line changes places with the same bit of the number of an element.
    while distance:
        lower = [i + (size - distance if i & distance else 0) for i in range(size)]
        upper = [i + (size if i & distance else distance) for i in range(size)]
        for one in range(size):
            if not one & distance:
                other = one + distance
                pair = columns[one], columns[other]
                columns[one] = shuffle(builder, pair[0], lower, pair[1])
                columns[other] = shuffle(builder, pair[0], upper, pair[1])
        distance //= 2
    return columns
