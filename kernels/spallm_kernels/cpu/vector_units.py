"""Describe the vector instructions that look up 32-bit table entries, and choose those of the host.

A table of up to 16 entries fits in the registers of each unit:

* AVX-512: `vpermps` reads 16 entries, one register.
* AVX2: `vpermps` reads 8 entries. For 16, two results are blended by bit 3 of the code.
* NEON: `tbl` reads bytes from up to four registers of 16 bytes. A code becomes four indices.

All of them look entries up exactly, whatever their bits mean. AMX multiplies bfloat16 in tile
registers of its own (see `matrix.py`), beside AVX-512. `emit` functions append LLVM
instructions. Registers and codes are vectors of `lanes` elements.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from .llvm import FLOAT, INT8, INT32, call, constants, shuffle, vector

#: Set it to the name of a unit, or to `portable`, to choose another path than the fastest one.
CHOICE = "SPALLM_CPU"
PORTABLE = "portable"
#: Numbers of Linux on x86-64: of the call, of what it is to do, and of what is asked for.
_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_STATE = 158, 0x1023, 18

Value = Any  # llvmlite's values have no types


@dataclass(frozen=True)
class VectorUnit:
    """Describe a set of vector instructions.

    Attributes:
        name: Name, as `SPALLM_CPU` takes it.
        lanes: Elements of 32 bits in a register.
        features: Features of LLVM that it needs.
        machines: Names of the processor architecture, as `platform.machine` returns them.
        rows: Rows of a tile with 1, 2 and 4 tokens, at most 4. Sums of a tile and tables of its
            rows stay in registers.
        block: Rows and tokens of a tile with more tokens, a multiple of 4. On AVX-512, 2 rows and
            8 tokens look half the weights up of 4 rows and 4 tokens, and take 0.8 of their time.
        panel: Rows and vectors of a tile of a dense product. Its sums stay in registers.
        spread: Return the registers of a table, given its 2^bits entries as a float32 vector.
        look_up: Return the entries for codes, given the registers and an int32 vector. Only the
            low bits of a code count.
        base: Name of the unit whose vector instructions it has too; None if those are its own.
        has_matrix: Whether it multiplies bfloat16 in tile registers (see `matrix.py`).
    """

    name: str
    lanes: int
    features: tuple[str, ...]
    machines: tuple[str, ...]
    rows: tuple[int, int, int]
    block: tuple[int, int]
    panel: tuple[int, int]
    spread: Callable[[Any, Value], list[Value]]
    look_up: Callable[[Any, Sequence[Value], Value], Value]
    base: str | None = None
    has_matrix: bool = False

    @property
    def tiles(self) -> tuple[int, int, int, int, int]:
        """Return the rows of a tile with 1, 2 and 4 tokens, then those and tokens of a block."""
        return *self.rows, *self.block

    @property
    def key(self) -> str:
        """Return the name and a digest of our source, for compiled functions to be kept by.

        Numba keeps a function until its own file changes. Its instructions come from other files.
        """
        return f"{self.base or self.name} {_digest()}"


def unit_of(key: str) -> VectorUnit:
    """Return the unit with a key."""
    return _BY_NAME[key.partition(" ")[0]]


@functools.cache
def host_unit() -> VectorUnit | None:
    """Return the unit to use on this machine, or None for the portable loops.

    Raises:
        ValueError: If the environment variable `SPALLM_CPU` names a unit that does not exist or
            that this machine lacks.
    """
    choice = os.environ.get(CHOICE)
    if choice == PORTABLE:
        return None
    found = available_units()
    if choice is None:
        return next(iter(found.values()), None)
    if choice not in found:
        raise ValueError(
            f"{CHOICE}={choice!r} cannot be used; on this machine, accepted are "
            f"{', '.join([*found, PORTABLE])}"
        )
    return found[choice]


def available_units() -> dict[str, VectorUnit]:
    """Return the units that this machine has, the fastest first, by name."""
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know this CPU
        features = {}
    return {
        unit.name: unit
        for unit in UNITS
        if platform.machine() in unit.machines
        and all(features.get(feature, False) for feature in unit.features)
        and (not unit.has_matrix or permit_matrix())
    }


@functools.cache
def permit_matrix() -> bool:
    """Ask the system to let this process use the tile registers of AMX, and return whether it does.

    Linux keeps 8 KiB more for each thread of a process that uses them, so it wants to be asked.
    Source: docs.kernel.org/arch/x86/xstate.html.
    """
    if platform.system() != "Linux":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_STATE) == 0


def _avx512_spread(builder: Any, entries: Value) -> list[Value]:
    return [shuffle(builder, entries, [i % entries.type.count for i in range(16)])]


def _avx512_look_up(builder: Any, registers: Sequence[Value], codes: Value) -> Value:
    floats = vector(FLOAT, 16)
    return call(builder, "llvm.x86.avx512.permvar.sf.512", floats, [registers[0], codes])


def _avx2_spread(builder: Any, entries: Value) -> list[Value]:
    count = entries.type.count
    starts = range(0, max(count, 8), 8)
    return [shuffle(builder, entries, [(start + i) % count for i in range(8)]) for start in starts]


def _avx2_look_up(builder: Any, registers: Sequence[Value], codes: Value) -> Value:
    floats = vector(FLOAT, 8)
    found = [
        call(builder, "llvm.x86.avx2.permps", floats, [register, codes]) for register in registers
    ]
    if len(found) == 1:
        return found[0]
    bit_3_as_sign = builder.shl(codes, constants(INT32, [28] * 8))
    mask = builder.bitcast(bit_3_as_sign, floats)
    return call(builder, "llvm.x86.avx.blendv.ps.256", floats, [*found, mask])


def _neon_spread(builder: Any, entries: Value) -> list[Value]:
    return [
        builder.bitcast(shuffle(builder, entries, range(start, start + 4)), vector(INT8, 16))
        for start in range(0, entries.type.count, 4)
    ]


def _neon_look_up(builder: Any, registers: Sequence[Value], codes: Value) -> Value:
    entries = 4 * len(registers)
    low = builder.and_(codes, constants(INT32, [entries - 1] * 4))
    first_bytes = builder.mul(low, constants(INT32, [0x04040404] * 4))
    indices = builder.add(first_bytes, constants(INT32, [0x03020100] * 4))
    found = call(
        builder,
        f"llvm.aarch64.neon.tbl{len(registers)}.v16i8",
        vector(INT8, 16),
        [*registers, builder.bitcast(indices, vector(INT8, 16))],
    )
    return builder.bitcast(found, vector(FLOAT, 4))


AVX512 = VectorUnit(
    name="avx512",
    lanes=16,
    features=("avx512f", "avx512bw", "avx512vl", "avx512dq", "f16c"),
    machines=("x86_64", "AMD64"),
    rows=(4, 4, 4),
    block=(2, 8),
    panel=(6, 4),
    spread=_avx512_spread,
    look_up=_avx512_look_up,
)
AMX = dataclasses.replace(
    AVX512,
    name="amx",
    features=(*AVX512.features, "amx-tile", "amx-bf16"),
    base=AVX512.name,
    has_matrix=True,
)
UNITS = (
    AMX,
    AVX512,
    VectorUnit(
        name="avx2",
        lanes=8,
        features=("avx2", "fma", "f16c"),
        machines=("x86_64", "AMD64"),
        rows=(4, 2, 2),
        block=(2, 4),
        panel=(6, 2),
        spread=_avx2_spread,
        look_up=_avx2_look_up,
    ),
    VectorUnit(
        name="neon",
        lanes=4,
        features=(),  # every such processor has it, but LLVM does not always say so
        machines=("aarch64", "arm64"),
        rows=(4, 2, 2),
        block=(2, 4),
        panel=(6, 4),
        spread=_neon_spread,
        look_up=_neon_look_up,
    ),
)

_BY_NAME = {unit.name: unit for unit in UNITS}


@functools.cache
def _digest() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
