"""Define numba functions that convert inputs and results of 16 bits in vector registers.

Products are summed in float32. Inputs are widened once per call, and a block of sums is rounded by
the thread that computed it, so no other operation has to read or write them.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils

from .llvm import FLOAT_BYTES, Value, element, load, native, number, store
from .steps import ENTRY_BYTES, entries_of, rounded_entries

#: Binary logarithm of the elements that are converted at once.
_WIDE = 4


@native
def widen(context, source, target, count, kind):  # type: ignore[no-untyped-def]
    """Write elements as float32. Elements that are float32 already stay where they are.

    Args:
        context: Numba's typing context.
        source: Address of the elements, int64.
        target: Address where to write, int64.
        count: Number of elements, int64.
        kind: Kind of an element, a constant: `float32`, `float16` or `bfloat16`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if kind.literal_value != "float32":
            emit_widen(builder, arguments, kind.literal_value)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3, kind), generate


@native
def add_bias(context, sums, bias, count, kind):  # type: ignore[no-untyped-def]
    """Add elements to float32 sums.

    Args:
        context: Numba's typing context.
        sums: Address of the sums, int64.
        bias: Address of the elements, int64.
        count: Number of elements, int64.
        kind: Kind of an element, a constant: `float32`, `float16` or `bfloat16`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit_add_bias(builder, arguments, kind.literal_value)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3, kind), generate


@native
def narrow(context, sums, target, count, kind):  # type: ignore[no-untyped-def]
    """Round float32 sums to the nearest elements, ties to even. float32 stays where it is.

    Args:
        context: Numba's typing context.
        sums: Address of the sums, int64.
        target: Address where to write, int64.
        count: Number of elements, int64.
        kind: Kind of an element, a constant: `float32`, `float16` or `bfloat16`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if kind.literal_value != "float32":
            emit_narrow(builder, arguments, kind.literal_value)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3, kind), generate


def emit_widen(builder: Any, arguments: Any, kind: str) -> None:
    """Append the instructions of `widen`, given its arguments."""
    source, target, count = arguments[:3]
    for start, bits in _pieces(builder, count):
        values = entries_of(builder, element(builder, source, start, ENTRY_BYTES[kind]), bits, kind)
        store(builder, values, element(builder, target, start, FLOAT_BYTES))


def emit_add_bias(builder: Any, arguments: Any, kind: str) -> None:
    """Append the instructions of `add_bias`, given its arguments."""
    sums, bias, count = arguments[:3]
    for start, bits in _pieces(builder, count):
        values = entries_of(builder, element(builder, bias, start, ENTRY_BYTES[kind]), bits, kind)
        place = element(builder, sums, start, FLOAT_BYTES)
        store(builder, builder.fadd(load(builder, place, values.type), values), place)


def emit_narrow(builder: Any, arguments: Any, kind: str) -> None:
    """Append the instructions of `narrow`, given its arguments."""
    sums, target, count = arguments[:3]
    for start, bits in _pieces(builder, count):
        address = element(builder, sums, start, FLOAT_BYTES)
        values = entries_of(builder, address, bits, "float32")
        rounded = rounded_entries(builder, values, kind)
        store(builder, rounded, element(builder, target, start, ENTRY_BYTES[kind]))


def _pieces(builder: Any, count: Value) -> Any:
    """Open a loop over whole vectors of elements, then one over the elements behind them.

    Yields:
        The number of the first element, int64, and the binary logarithm of the elements.
    """
    whole = builder.lshr(count, number(_WIDE))
    with cgutils.for_range(builder, whole) as loop:
        yield builder.shl(loop.index, number(_WIDE)), _WIDE
    done = builder.shl(whole, number(_WIDE))
    with cgutils.for_range(builder, builder.sub(count, done)) as loop:
        yield builder.add(done, loop.index), 0
