"""Emulate the tile registers of AMX in Python, for code that LLVM compiles for this machine."""

from __future__ import annotations

import ctypes
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from spallm_kernels.cpu.llvm import INT64

_TILES, _ROWS, _ROW_BYTES = 8, 16, 64


class TileRegisters:
    """Carry instructions out on tiles. `emit` takes the place of `matrix_tiles._amx`."""

    def __init__(self) -> None:
        self._tiles = np.zeros((_TILES, _ROWS, _ROW_BYTES), np.uint8)
        self.configured = False
        self.products = 0
        self._kept: list[Any] = []  # ctypes forgets functions that nothing refers to

    def emit(self, builder: Any, name: str, *arguments: Any) -> None:
        """Append a call of the method with the name of an instruction."""
        symbol = f"emulated_{name}_{id(self)}"
        if symbol not in builder.module.globals:
            kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(arguments))
            function = kind(getattr(self, name))
            self._kept.append(function)
            llvm.add_symbol(symbol, ctypes.cast(function, ctypes.c_void_p).value)
            ir.Function(
                builder.module,
                ir.FunctionType(ir.VoidType(), [INT64] * len(arguments)),
                symbol,
            )
        numbers = []
        for argument in arguments:
            if isinstance(argument.type, ir.PointerType):
                numbers.append(builder.ptrtoint(argument, INT64))
            elif argument.type.width < INT64.width:
                numbers.append(builder.zext(argument, INT64))
            else:
                numbers.append(argument)
        builder.call(builder.module.globals[symbol], numbers)

    def ldtilecfg(self, address: int) -> None:
        described = np.frombuffer(ctypes.string_at(address, 64), np.uint8)
        assert described[0] == 1
        assert (described[16:32].view(np.uint16) == _ROW_BYTES).all()
        assert (described[48:56] == _ROWS).all()
        assert not described[1:16].any()
        assert not described[32:48].any()
        assert not described[56:].any()
        self.configured = True

    def tilerelease(self) -> None:
        self.configured = False
        self._tiles[:] = 0xFF  # nothing may use them any more

    def tilezero(self, tile: int) -> None:
        self._tiles[tile] = 0

    def tileloadd64(self, tile: int, address: int, stride: int) -> None:
        for row in range(_ROWS):
            line = ctypes.string_at(address + row * stride, _ROW_BYTES)
            self._tiles[tile, row] = np.frombuffer(line, np.uint8)

    def tilestored64(self, tile: int, address: int, stride: int) -> None:
        for row in range(_ROWS):
            ctypes.memmove(address + row * stride, self._tiles[tile, row].tobytes(), _ROW_BYTES)

    def tdpbf16ps(self, sums: int, left: int, right: int) -> None:
        self.products += 1
        rows = _bfloat16(self._tiles[left])
        pairs = _bfloat16(self._tiles[right]).reshape(_ROWS, 16, 2)
        columns = pairs.transpose(0, 2, 1).reshape(2 * _ROWS, 16)
        total = self._tiles[sums].view(np.float32)
        total += (rows.astype(np.float64) @ columns).astype(np.float32)


def _bfloat16(tile: Any) -> Any:
    """Return the elements of a tile as float32."""
    return (tile.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
