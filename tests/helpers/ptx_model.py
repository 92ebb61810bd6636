"""Run straight-line PTX in NumPy: enough of it to prove what the assembly of a lookup computes.

The text that runs here is the text that the compiler gets. Every operand is an array of uint32 (or
uint16 for halves), so all code values are computed at once.
"""

from __future__ import annotations

import re

import numpy as np


def run(assembly: str, outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Run a block on $<outputs> and later operands; return the operands $0 to $<outputs - 1>."""
    values = {f"${outputs + number}": value for number, value in enumerate(inputs)}
    for statement in assembly.strip().strip("{}").split(";"):
        text = statement.strip()
        if not text or text.startswith(".reg"):
            continue
        operation, operands = text.split(None, 1)
        _OPERATIONS[operation](values, _split(operands))
    return [values[f"${number}"] for number in range(outputs)]


def _split(operands: str) -> list[str]:
    return [part.strip() for part in re.findall(r"\{[^}]*\}|[^,\s]+", operands)]


def _read(values: dict, operand: str) -> np.ndarray:
    if operand[0].isdigit():
        return np.uint32(int(operand, 0))
    return values[operand].astype(np.uint32)


def _binary(function):
    def operation(values, operands):
        first, second = (_read(values, operand) for operand in operands[1:])
        values[operands[0]] = function(first, second).astype(np.uint32)

    return operation


def _mov(values, operands):
    """Run mov.b32: between two registers, or between a register and two halves, low one first."""
    target, source = operands
    if target.startswith("{"):
        low, high = _split(target.strip("{}"))
        whole = _read(values, source)
        values[low] = (whole & 0xFFFF).astype(np.uint16)
        values[high] = (whole >> 16).astype(np.uint16)
    elif source.startswith("{"):
        low, high = (_read(values, half) for half in _split(source.strip("{}")))
        values[target] = low | high << 16
    else:
        values[target] = _read(values, source)


def _prmt(values, operands):
    """Run prmt.b32: nibbles choose four bytes of b:a; bit 3 of a nibble spreads the byte's sign."""
    a, b, selector = (_read(values, operand) for operand in operands[1:])
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.uint32(0)
    for position in range(4):
        nibble = selector >> np.uint32(4 * position) & np.uint32(0xF)
        byte = (both >> (nibble & 7).astype(np.uint64) * np.uint64(8)).astype(np.uint32) & 0xFF
        byte = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint32)
        result = result | byte << np.uint32(8 * position)
    values[operands[0]] = result


def _lop3(values, operands):
    """Run lop3.b32: any function of three bits, given as its value on 0xf0, 0xcc and 0xaa."""
    a, b, c = (_read(values, operand) for operand in operands[1:4])
    function = int(operands[4], 0)
    result = np.uint32(0)
    for row in range(8):
        if function >> row & 1:
            chosen = (
                value if row >> bit & 1 else ~value for bit, value in ((2, a), (1, b), (0, c))
            )
            first, second, third = chosen
            result = result | first & second & third
    values[operands[0]] = result.astype(np.uint32)


def _mad(values, operands):
    a, b, c = (_read(values, operand).astype(np.uint64) for operand in operands[1:])
    values[operands[0]] = (a * b + c & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def _shf(values, operands):
    """Run shf.r.clamp.b32: the low word of high:low shifted right."""
    low, high, shift = (_read(values, operand).astype(np.uint64) for operand in operands[1:])
    values[operands[0]] = ((high << np.uint64(32) | low) >> shift).astype(np.uint32)


_OPERATIONS = {
    "mov.b32": _mov,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "mad.lo.u32": _mad,
    "shf.r.clamp.b32": _shf,
    "and.b32": _binary(lambda a, b: a & b),
    "or.b32": _binary(lambda a, b: a | b),
    "xor.b32": _binary(lambda a, b: a ^ b),
    "shl.b32": _binary(lambda a, b: a << b),
    "shr.u32": _binary(lambda a, b: a >> b),
}
