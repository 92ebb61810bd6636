"""Look up a unit of codes in a table inside a kernel (see `ptx.py` for units and the method).

With ASM the weights come from byte permutes. Without ASM they come from `tl.gather`, which does the
same more plainly, and which Triton's interpreter can run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import ptx
from .codes import unit_code

_SPLIT_2, _SPLIT_3, _SPLIT_4 = (tl.constexpr(ptx.split_table(bits)) for bits in (2, 3, 4))
_ONE_HOT_2, _ONE_HOT_3, _ONE_HOT_4 = (tl.constexpr(ptx.one_hot(bits)) for bits in (2, 3, 4))
_LOOK_UP_2, _LOOK_UP_3, _LOOK_UP_4 = (tl.constexpr(ptx.look_up(bits)) for bits in (2, 3, 4))


@triton.jit
def unstack(tensor, COUNT: tl.constexpr):
    """Split [..., 2, 2, ...] into a tuple of its COUNT innermost entries, in bit-reversed order."""
    if COUNT == 1:
        return (tensor,)
    else:
        even, odd = tl.split(tensor)
        return unstack(even, COUNT // 2) + unstack(odd, COUNT // 2)


@triton.jit
def stack(tensors):
    """Join a tuple of 2^n tensors into one of shape [..., 2, 2, ...], in order."""
    if len(tensors) == 1:
        return tensors[0]
    else:
        return tl.join(stack(tensors[0::2]), stack(tensors[1::2]))


@triton.jit
def prepare(table, BITS: tl.constexpr, ASM: tl.constexpr):
    """Convert a table to the form that `look_up` needs.

    table: [..., 2^BITS] of 16-bit floats; of any float dtype without ASM.
    """
    if not ASM:
        return (table,)
    else:
        asm: tl.constexpr = _SPLIT_4 if BITS == 4 else (_SPLIT_3 if BITS == 3 else _SPLIT_2)
        halves: tl.constexpr = (2,) * BITS
        entries = table.to(tl.int16, bitcast=True).reshape(table.shape[:-1] + halves)
        registers: tl.constexpr = 2 if BITS == 2 else 2 ** (BITS - 1)
        return tl.inline_asm_elementwise(
            asm[0],
            asm[1],
            unstack(entries, 2**BITS),
            dtype=(tl.uint32,) * registers,
            is_pure=True,
            pack=1,
        )


@triton.jit
def look_up(unit, prepared, DTYPE: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Return the weights of units, a tuple of one tensor of DTYPE per code.

    unit: a tuple of tensors [..., units]. prepared: `prepare` of a table [..., 2^BITS].
    """
    weights = ()
    if ASM:
        asm: tl.constexpr = _LOOK_UP_4 if BITS == 4 else (_LOOK_UP_3 if BITS == 3 else _LOOK_UP_2)
        words: tl.constexpr = 3 if BITS == 3 else 1
        codes: tl.constexpr = 32 * words // BITS
        for first in tl.static_range(0, len(unit), words):
            arguments = unit[first : first + words]
            for number in tl.static_range(len(prepared)):
                arguments = arguments + (tl.expand_dims(prepared[number], -1),)
            halves = tl.inline_asm_elementwise(
                asm[0], asm[1], arguments, dtype=(tl.int16,) * codes, is_pure=True, pack=1
            )
            for code in tl.static_range(codes):
                weights = weights + (halves[code].to(DTYPE, bitcast=True),)
        return weights
    else:
        table = prepared[0]
        for code in tl.static_range(32 * len(unit) // BITS):
            found = unit_code(unit, code, BITS)
            weights = weights + (tl.gather(table, found, len(table.shape) - 1),)
        return weights


@triton.jit
def one_hot(unit, entry, DTYPE: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Compare codes with entries: return a tuple of one tensor of DTYPE per code of a unit.

    A value is zero where the code is not the entry, and elsewhere `ptx.ONE` of DTYPE, or 1 without
    ASM.

    unit: a tuple of tensors [slots, rows, units]. entry: int [rows * 2^BITS], numbers of entries.
    The results are [slots, rows * 2^BITS, units].
    """
    slots: tl.constexpr = unit[0].shape[0]
    rows: tl.constexpr = unit[0].shape[1]
    units: tl.constexpr = unit[0].shape[2]
    lines = ()
    for number in tl.static_range(len(unit)):
        repeated = tl.broadcast_to(tl.expand_dims(unit[number], 2), (slots, rows, 2**BITS, units))
        lines = lines + (repeated.reshape(slots, rows * 2**BITS, units),)
    entry = entry[None, :, None]
    marks = ()
    if ASM:
        asm: tl.constexpr = _ONE_HOT_4 if BITS == 4 else (_ONE_HOT_3 if BITS == 3 else _ONE_HOT_2)
        words: tl.constexpr = 3 if BITS == 3 else 1
        codes: tl.constexpr = 32 * words // BITS
        pattern = (entry * (0x55555555 if BITS == 2 else 0x11111111)).to(tl.uint32, bitcast=True)
        for first in tl.static_range(0, len(unit), words):
            halves = tl.inline_asm_elementwise(
                asm[0],
                asm[1],
                lines[first : first + words] + (pattern,),
                dtype=(tl.int16,) * codes,
                is_pure=True,
                pack=1,
            )
            for code in tl.static_range(codes):
                marks = marks + (halves[code].to(DTYPE, bitcast=True),)
    else:
        for code in tl.static_range(32 * len(unit) // BITS):
            marks = marks + ((unit_code(lines, code, BITS) == entry).to(DTYPE),)
    return marks


@triton.jit
def by_lane(
    tensor,
    SLOTS: tl.constexpr,
    LINES: tl.constexpr,
    UNITS: tl.constexpr,
    CODES: tl.constexpr,
    K_PER_LANE: tl.constexpr,
):
    """Reorder columns of [SLOTS, LINES, ...]: four units side by side, K_PER_LANE codes each."""
    split = tensor.reshape(SLOTS, LINES, UNITS // 4, 4, CODES // K_PER_LANE, K_PER_LANE)
    return split.permute(0, 1, 2, 4, 3, 5).reshape(SLOTS, LINES, UNITS * CODES)
