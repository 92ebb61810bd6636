"""Compile the instructions of a vector unit without numba, and run them. NEON is emulated.

Numba takes a second for a kernel. LLVM alone takes milliseconds for a function, so tests can cover
every kind of sketch. It can also compile for another processor.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from helpers.arm64 import Emulator
from spallm_kernels.cpu.llvm import FLOAT_BYTES, INT64, element, number, store, variable
from spallm_kernels.cpu.mixed_tiles import FIELDS, NUMBER_BYTES, emit_mixed_tile
from spallm_kernels.cpu.panels import emit_outer_products
from spallm_kernels.cpu.tiles import Sketch, emit_last_step, emit_rest, emit_steps, emit_tile
from spallm_kernels.cpu.vector_units import available_units, unit_of

EMULATED = "neon"  # on ARM too, to notice accesses beyond the end of an array
#: Units to test on this machine: those with vector instructions of their own.
UNITS = [
    *(name for name, unit in available_units().items() if not unit.base and name != EMULATED),
    EMULATED,
]
ARM_TRIPLE = "aarch64-unknown-linux-gnu"
X86_TRIPLE = "x86_64-unknown-linux-gnu"

#: Kinds of entries that lookups use. Products convert the entries of others.
LOOKED_UP = ("float32", "raw16")

#: Rows and tokens of tiles whose tokens have tables of their own.
MIXED = ((2, 4), (4, 2))

#: Function of a builder and the int64 arguments of a compiled function, and their number.
Body = tuple[int, Callable[[Any, list[Any]], None]]


def sketch_bodies(unit: str, bits: int, kind: str, hashed: int) -> dict[str, Body]:
    """Return functions that compute with a kind of sketch, by name.

    The first 7 arguments are the same for all (see `tiles.Sketch`).

    Args:
        unit: Name of the vector unit.
        bits: Bits of a code.
        kind: Kind of a table entry.
        hashed: 1 if codes are hashed.
    """
    described = unit_of(unit)

    def sketch(arguments: list[Any]) -> Sketch:
        return Sketch(*arguments[:7], described, bits, kind, hashed)

    def tile(rows: int, tokens: int) -> Body:
        return 10, lambda builder, given: emit_tile(
            builder, sketch(given), *given[7:], (rows, tokens)
        )

    name = f"{bits}_{kind}_{hashed}"
    bodies: dict[str, Body] = {}
    if kind in LOOKED_UP:
        bodies[f"steps_{name}"] = (
            11,
            lambda builder, given: emit_steps(builder, sketch(given), *given[7:]),
        )
        bodies[f"last_{name}"] = (
            9,
            lambda builder, given: emit_last_step(builder, sketch(given), *given[7:]),
        )
    if kind != "raw16":
        shapes = {*zip(described.rows, (1, 2, 4), strict=True), described.block, (1, 1)}
        bodies |= {f"tile_{name}_{rows}_{tokens}": tile(rows, tokens) for rows, tokens in shapes}
        bodies[f"rest_{name}"] = (
            9,
            lambda builder, given: emit_rest(builder, sketch(given), *given[7:]),
        )
    return bodies


def mixed_bodies(unit: str, bits: int, kind: str, hashed: int) -> dict[str, Body]:
    """Return functions that multiply tokens with tables of their own, by name.

    The first 10 arguments are those of a tile, with the tables of the first token. The last one is
    the bytes from a token's tables to those of the next.
    """
    described = unit_of(unit)

    def mixed(rows: int, tokens: int) -> Body:
        return 11, lambda builder, given: _emit_mixed(
            builder, Sketch(*given[:7], described, bits, kind, hashed), *given[7:], (rows, tokens)
        )

    return {f"mixed_{rows}_{tokens}": mixed(rows, tokens) for rows, tokens in MIXED}


def _emit_mixed(
    builder: Any,
    sketch: Sketch,
    x: Any,
    y: Any,
    y_stride: Any,
    table_stride: Any,
    shape: tuple[int, int],
) -> None:
    """Write the addresses of every token and append a mixed tile."""
    count = FIELDS * shape[1]
    places = builder.ptrtoint(variable(builder, ir.ArrayType(INT64, count)), INT64)
    x_stride = builder.mul(builder.mul(sketch.groups, sketch.width), number(FLOAT_BYTES))
    starts = ((sketch.table, table_stride), (x, x_stride), (y, y_stride))
    for token in range(shape[1]):
        for field, (start, stride) in enumerate(starts):
            place = element(builder, places, number(FIELDS * token + field), NUMBER_BYTES)
            store(builder, element(builder, start, number(token), stride), place)
    emit_mixed_tile(builder, dataclasses.replace(sketch, table=places), shape)


def outer_bodies(unit: str) -> dict[str, Body]:
    """Return functions that add outer products, by name, for the tiles of a unit."""
    described = unit_of(unit)
    tall, vectors = described.panel
    return {
        f"outer_{rows}": (
            6,
            lambda builder, given, rows=rows: emit_outer_products(
                builder, described, *given, (rows, vectors)
            ),
        )
        for rows in (tall, 1)
    }


class Machine:
    """Run functions of a vector unit."""

    def __init__(self, unit: str, bodies: dict[str, Body]) -> None:
        native = unit != EMULATED
        target = _target_machine(native)
        module = _compiled(target, bodies)
        self._counts = {name: count for name, (count, _) in bodies.items()}
        self._emulator = None if native else Emulator(target.emit_object(module))
        if native:
            self._engine = llvm.create_mcjit_compiler(module, target)
            self._engine.finalize_object()

    def run(self, name: str, *arguments: int | np.ndarray) -> None:
        """Call a function with numbers, and with the addresses of arrays, which it may change."""
        assert len(arguments) == self._counts[name]
        if self._emulator is not None:
            self._emulator.run(name, arguments)
            return
        signature = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(arguments))
        signature(self._engine.get_function_address(name))(
            *[each.ctypes.data if isinstance(each, np.ndarray) else each for each in arguments]
        )


def assembly(unit: str, bodies: dict[str, Body]) -> str:
    """Return the text of compiled functions."""
    target = _target_machine(unit != EMULATED)
    return target.emit_assembly(_compiled(target, bodies))


def x86_assembly(features: Sequence[str], bodies: dict[str, Body]) -> str:
    """Return the text of functions compiled for an x86-64 processor with some features."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    wanted = ",".join(f"+{feature}" for feature in features)
    target = llvm.Target.from_triple(X86_TRIPLE).create_target_machine("x86-64", wanted, opt=3)
    return target.emit_assembly(_compiled(target, bodies))


def _target_machine(native: bool) -> Any:
    """Return LLVM's description of this machine, or of a 64-bit ARM with NEON.

    An engine that runs code owns its description, so it is not cached.
    """
    if native:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        features = llvm.get_host_cpu_features().flatten()
        return llvm.Target.from_default_triple().create_target_machine(
            llvm.get_host_cpu_name(), features, opt=3, jit=True
        )
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(ARM_TRIPLE).create_target_machine(
        "generic", "+neon", opt=3, reloc="pic", codemodel="small"
    )


def _compiled(target: Any, bodies: dict[str, Body]) -> Any:
    """Return an optimised module."""
    module = ir.Module()
    module.triple, module.data_layout = target.triple, str(target.target_data)
    for name, (count, body) in bodies.items():
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [INT64] * count), name)
        builder = ir.IRBuilder(function.append_basic_block())
        body(builder, list(function.args))
        builder.ret_void()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
    passes = llvm.create_pass_builder(target, options)
    passes.getModulePassManager().run(parsed, passes)
    return parsed
