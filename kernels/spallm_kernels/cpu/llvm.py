"""Append LLVM instructions: a few shorthands for llvmlite's builder.

Addresses are int64 numbers, as `Tensor.data_ptr` returns them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()

FLOAT_BYTES = 4

Value = Any  # llvmlite's values have no types


def native(function: Callable[..., Any]) -> Any:
    """Return a function that numba compiles to the instructions which `function` appends.

    Arguments that are constants in the calling function are types with a `literal_value`.
    """
    return intrinsic(prefer_literal=True)(function)


def vector(element: Any, count: int) -> Any:
    """Return the type of a vector."""
    return ir.VectorType(element, count)


def constants(element: Any, values: Iterable[float]) -> Value:
    """Return a constant vector."""
    values = list(values)
    return ir.Constant(vector(element, len(values)), values)


def number(value: int) -> Value:
    """Return a constant int64."""
    return ir.Constant(INT64, value)


def element(builder: Any, first: Value, index: Value, size: Value | int) -> Value:
    """Return the address of an element, given that of the first one and the size in bytes."""
    size = number(size) if isinstance(size, int) else size
    return builder.add(first, builder.mul(index, size))


def load(builder: Any, address: Value, kind: Any) -> Value:
    """Return what lies at an address, which need not be aligned."""
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = 1
    return loaded


def store(builder: Any, value: Value, address: Value) -> None:
    """Write a value to an address, which need not be aligned."""
    stored = builder.store(value, builder.inttoptr(address, value.type.as_pointer()))
    stored.align = 1


def call(builder: Any, name: str, result: Any, arguments: Sequence[Value]) -> Value:
    """Call one of LLVM's intrinsic functions."""
    functions = builder.module.globals
    if name not in functions:
        ir.Function(
            builder.module, ir.FunctionType(result, [value.type for value in arguments]), name
        )
    return builder.call(functions[name], arguments)


def shuffle(builder: Any, value: Value, indices: Iterable[int], other: Value = None) -> Value:
    """Return elements of a vector, or of two vectors of which the second one's follow."""
    if other is None:
        other = ir.Constant(value.type, ir.Undefined)
    return builder.shuffle_vector(value, other, constants(INT32, indices))


def variable(builder: Any, kind: Any) -> Value:
    """Return the pointer to a new variable of a function. LLVM keeps variables in registers."""
    return cgutils.alloca_once(builder, kind)  # type: ignore[no-untyped-call]


def splat(builder: Any, value: Value, count: int) -> Value:
    """Return a vector with the same value in every element."""
    empty = ir.Constant(vector(value.type, count), ir.Undefined)
    single = builder.insert_element(empty, value, ir.Constant(INT32, 0))
    return shuffle(builder, single, [0] * count)


def add_up(builder: Any, value: Value) -> Value:
    """Return the sum of the elements of a vector, taken in halves."""
    count = value.type.count
    while count > 1:
        count //= 2
        value = builder.fadd(
            shuffle(builder, value, range(count)),
            shuffle(builder, value, range(count, 2 * count)),
        )
    return builder.extract_element(value, ir.Constant(INT32, 0))
