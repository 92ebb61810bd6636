"""Run object code for 64-bit ARM in an emulator (unicorn), on any machine.

The loader knows as much of ELF as LLVM's output for `unit_machine.py` needs: functions that call
nothing, and constants that they read relative to their own address. Anything else is refused.

Every array lies in pages of its own, and its last byte is the last byte of them: an access beyond
its end is an error of the emulator.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import unicorn
from unicorn import arm64_const as arm64

_PAGE = 4096
_CODE, _STACK, _ARRAYS = 0x10_0000, 0x4000_0000, 0x8000_0000
_STACK_BYTES = 1 << 20
#: A call returns to this address, where the emulator stops.
_END = 0x1000
_ALLOCATED = 2  # flag of a section that belongs in memory (SHF_ALLOC)
_SYMBOLS, _RELOCATIONS = 2, 4  # types of sections (SHT_SYMTAB, SHT_RELA)
_PAGE_OF_ADDRESS = 275  # R_AARCH64_ADR_PREL_PG_HI21, of an ADRP instruction
#: Relocations of the low 12 bits of an address, in units of what the instruction loads.
_LOW_BITS = {277: 1, 278: 1, 284: 2, 285: 4, 286: 8, 299: 16}


@dataclass(frozen=True)
class _Section:
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    target: int
    alignment: int


class Emulator:
    """Emulate a processor with the functions of an object file in memory."""

    def __init__(self, data: bytes) -> None:
        self._machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        image, self._functions = _linked(data)
        self._machine.mem_map(_CODE, _in_pages(len(image)))
        self._machine.mem_write(_CODE, bytes(image))
        self._machine.mem_map(_STACK, _STACK_BYTES)
        self._ends: dict[tuple[int, int], int] = {}
        self._free = _ARRAYS

    def run(self, name: str, arguments: Sequence[int | np.ndarray]) -> None:
        """Call a function with numbers, and with the addresses of arrays, which it may change.

        Raises:
            unicorn.UcError: If it reads or writes outside of its arrays.
        """
        arrays, numbers = [], []
        for place, argument in enumerate(arguments):
            if isinstance(argument, np.ndarray):
                assert argument.flags.c_contiguous
                address = self._end_of_memory(place, argument.nbytes) - argument.nbytes
                self._machine.mem_write(address, argument.tobytes())
                arrays.append((argument, address))
                numbers.append(address)
            else:
                numbers.append(argument)
        self._call(self._functions[name], numbers)
        for argument, address in arrays:
            found = self._machine.mem_read(address, argument.nbytes)
            argument[...] = np.frombuffer(found, argument.dtype).reshape(argument.shape)

    def _end_of_memory(self, place: int, size: int) -> int:
        """Return the end of memory for an argument. Unmapping it would make the emulator slow."""
        key = place, _in_pages(size)
        if key not in self._ends:
            self._machine.mem_map(self._free, key[1])
            self._ends[key] = self._free + key[1]
            self._free += key[1] + _PAGE
        return self._ends[key]

    def _call(self, address: int, numbers: Sequence[int]) -> None:
        """Pass 8 numbers in registers and the others on the stack, as the standard of ARM says."""
        stack = _STACK + _STACK_BYTES - 4096
        words = [number & (1 << 64) - 1 for number in numbers]
        for number, word in enumerate(words[:8]):
            self._machine.reg_write(arm64.UC_ARM64_REG_X0 + number, word)
        self._machine.mem_write(stack, struct.pack(f"<{len(words[8:])}Q", *words[8:]))
        self._machine.reg_write(arm64.UC_ARM64_REG_SP, stack)
        self._machine.reg_write(arm64.UC_ARM64_REG_LR, _END)
        self._machine.emu_start(address, _END)


def _in_pages(size: int) -> int:
    return max(1, -(-size // _PAGE)) * _PAGE


def _linked(data: bytes) -> tuple[bytearray, dict[str, int]]:
    """Return the memory image of an object file, for the address `_CODE`, and its functions."""
    assert data[:6] == b"\x7fELF\x02\x01"
    assert struct.unpack_from("<H", data, 18) == (183,)  # AArch64
    sections = list(_sections(data))
    image, places = bytearray(), {}
    for number, section in enumerate(sections):
        if section.flags & _ALLOCATED and section.size:
            image += bytes(-len(image) % max(1, section.alignment))
            places[number] = len(image)
            image += data[section.offset : section.offset + section.size]
    (table,) = (section for section in sections if section.kind == _SYMBOLS)
    names = sections[table.link].offset
    addresses, functions = [], {}
    for at in range(table.offset, table.offset + table.size, 24):
        name, information, _, section, value, _ = struct.unpack_from("<IBBHQQ", data, at)
        addresses.append(_CODE + places[section] + value if section in places else None)
        if information & 15 == 2:  # a function
            text = data[names + name : data.index(b"\0", names + name)].decode()
            functions[text] = addresses[-1]
    for section in sections:
        if section.kind == _RELOCATIONS and section.target in places:
            for at in range(section.offset, section.offset + section.size, 24):
                place, information, addend = struct.unpack_from("<QQq", data, at)
                target = addresses[information >> 32]
                assert target is not None, "functions must not call others"
                _relocate(
                    image, places[section.target] + place, information & 0xFFFFFFFF, target + addend
                )
    return image, functions


def _sections(data: bytes) -> Iterator[_Section]:
    (start,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    for number in range(count):
        _, kind, flags, _, offset, length, link, target, alignment, _ = struct.unpack_from(
            "<IIQQQQIIQQ", data, start + number * size
        )
        yield _Section(kind, flags, offset, length, link, target, alignment)


def _relocate(image: bytearray, place: int, kind: int, target: int) -> None:
    """Put an address into an instruction."""
    (instruction,) = struct.unpack_from("<I", image, place)
    if kind == _PAGE_OF_ADDRESS:
        pages = (target >> 12) - (_CODE + place >> 12)
        instruction |= (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
    elif kind in _LOW_BITS:
        instruction |= (target & 0xFFF) // _LOW_BITS[kind] << 10
    else:
        raise NotImplementedError(f"relocation {kind} of AArch64")
    struct.pack_into("<I", image, place, instruction)
