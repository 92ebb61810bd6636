"""Define a numba function that multiplies tokens with tables of their own, in vector registers.

The tokens of a tile share the packed codes of its rows. The codes of a step are unpacked once and
looked up once for each token. A product is added up in the order of `multiply_tile`, so it has the
same bits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from numba import types
from numba.core import cgutils

from .llvm import (
    FLOAT,
    FLOAT_BYTES,
    INT64,
    Value,
    add_up,
    element,
    load,
    native,
    number,
    store,
    vector,
)
from .steps import STEP
from .tiles import Sketch, add_products, sketch_of, zero

#: Numbers that describe tokens: addresses of their tables, of the inputs of the first one, and of
#: its product with row 0, and how many tokens there are, one after another.
FIELDS = 4
NUMBER_BYTES = 8


@native
def multiply_mixed_tile(  # type: ignore[no-untyped-def]
    context, codes, code_stride, places, groups, width, seed, row, unit, bits, kind, hashed, rows,
    tokens
):  # fmt: skip
    """Multiply tokens, each with tables of its own, with consecutive rows of shared codes.

    Groups are whole steps of 16 columns. The other arguments have the meaning of those of
    `multiply_tile`.

    Args:
        places: Address of int64 [tokens, FIELDS], a line for each token, int64.
        rows: Rows of the tile, a constant.
        tokens: Tokens of the tile, a constant.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sketch = sketch_of(arguments, unit, bits, kind, hashed)
        shape = rows.literal_value, tokens.literal_value
        emit_mixed_tile(builder, sketch, shape)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, unit, bits, kind, hashed, rows, tokens), generate


def emit_mixed_tile(builder: Any, sketch: Sketch, shape: tuple[int, int]) -> None:
    """Append the instructions of `multiply_mixed_tile`.

    Args:
        builder: Builder of llvmlite.
        sketch: The sketch, with the address of the places instead of tables.
        shape: Rows and tokens of the tile.
    """
    rows, tokens = shape
    floats = vector(FLOAT, sketch.unit.lanes)
    places = [_place(builder, sketch.table, token) for token in range(tokens)]
    sketches = [dataclasses.replace(sketch, table=table) for table, _, _ in places]
    sums = [[zero(builder, floats) for _ in range(tokens)] for _ in range(rows)]
    with cgutils.for_range(builder, sketch.groups) as group:
        codes = [
            [each.group(builder, row, group.index) for each in sketches] for row in range(rows)
        ]
        start = codes[0][0].first
        lines = [element(builder, x, start, FLOAT_BYTES) for _, x, _ in places]
        with cgutils.for_range(builder, sketch.steps(builder)) as step:
            column = builder.mul(step.index, number(STEP))
            unpacked = [of_row[0].unpacked(builder, step.index) for of_row in codes]
            weights = [
                [each.look_up(builder, found) for each in of_row]
                for of_row, found in zip(codes, unpacked, strict=True)
            ]
            inputs = [element(builder, line, column, FLOAT_BYTES) for line in lines]
            add_products(builder, weights, inputs, sums)
    for row in range(rows):
        number_of_row = builder.add(sketch.row, number(row))
        for (_, _, y), total in zip(places, sums[row], strict=True):
            product = add_up(builder, builder.load(total))
            store(builder, product, element(builder, y, number_of_row, FLOAT_BYTES))


def _place(builder: Any, places: Value, token: int) -> list[Value]:
    """Return the addresses that describe a token of the tile."""
    fields = (number(FIELDS * token + field) for field in range(3))
    return [load(builder, element(builder, places, at, NUMBER_BYTES), INT64) for at in fields]
