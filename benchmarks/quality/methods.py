"""The methods that the quality benchmark compares, by name, and what their codes take on disk.

All of them quantize the same layers, the linear ones inside blocks, and leave the rest of the model
as it is. Bits per weight are those of what has to be stored: codes, and the tables, scales and
zeros that they are read with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WIDTHS = (4, 3, 2)
#: Columns that share a scale and a zero. GPTQ's is what llm-compressor takes for rows of 576.
RTN_GROUP, HQQ_GROUP, GPTQ_GROUP = 128, 64, 64

#: Packages that a kind of method needs beside those of the project, by the names they are imported
#: by.
PEERS = {
    "nf4": ("bitsandbytes",),
    "hqq": ("hqq",),
    "gptq": ("llmcompressor",),
    "autoround": ("auto_round",),
}
#: Kinds of methods that are shown text.
CALIBRATED = (
    *("gptq", "autoround", "leanquant"),
    *("sketch-calibrated", "sketch-healed", "sketch-allocated"),
)
#: Bits per weight to allocate, in all: those of uniform 3 bits, and between the widths.
TARGETS = (2.5, 3.27, 3.75)
#: Steps of healing, of 1,024 tokens each.
HEAL_STEPS = 300


@dataclass(frozen=True, kw_only=True)
class Method:
    """kind: which quantizer, see `quality_quantize.KINDS`; bits: of a code, the least of the target
    where they are allocated; groups: tables per row of a sketch; target: bits per weight."""

    kind: str
    bits: int
    groups: int = 1
    target: float | None = None


def _methods() -> dict[str, Method]:
    found = {
        "dense": Method(kind="dense", bits=16),
        "nf4": Method(kind="nf4", bits=4),
    }
    for bits in WIDTHS:
        found[f"rtn-{bits}bit-g{RTN_GROUP}"] = Method(kind="rtn", bits=bits)
        found[f"hqq-{bits}bit-g{HQQ_GROUP}"] = Method(kind="hqq", bits=bits)
        found[f"gptq-{bits}bit-g{GPTQ_GROUP}"] = Method(kind="gptq", bits=bits)
        found[f"autoround-{bits}bit-g{RTN_GROUP}"] = Method(kind="autoround", bits=bits)
        found[f"leanquant-{bits}bit"] = Method(kind="leanquant", bits=bits)
        found[f"hash-{bits}bit-gpr4"] = Method(kind="hash", bits=bits, groups=4)
        for kind in ("sketch", "sketch-calibrated", "sketch-healed"):
            for groups in (1, 4):
                name = f"{kind}-{bits}bit-gpr{groups}"
                found[name] = Method(kind=kind, bits=bits, groups=groups)
    for target in TARGETS:
        found[f"sketch-allocated-{target:g}bit"] = Method(
            kind="sketch-allocated", bits=int(target), target=target
        )
    return found


METHODS = _methods()


def affine_bits(rows: int, columns: int, bits: int, group: int) -> int:
    """Bits of a layer of integers with a float16 scale and an integer zero for every group.

    A zero is as wide as a code. The last group of a row may be short.
    """
    return rows * (columns * bits + math.ceil(columns / group) * (16 + bits))


def table_bits(rows: int, columns: int, bits: int) -> int:
    """Bits of a layer with a float16 table of all code values for every row."""
    return rows * (columns * bits + (16 << bits))
