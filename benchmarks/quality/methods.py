"""List the methods that the quality benchmark compares, and count the bits that they store.

All methods quantize the same layers, the linear layers inside blocks, and leave the rest of the
model unchanged. Bits per weight count everything that must be stored: the codes, and the tables,
scales and zeros that decode them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WIDTHS = (4, 3, 2)
#: Columns that share a scale and a zero. GPTQ's is what llm-compressor accepts for rows of 576.
RTN_GROUP, HQQ_GROUP, GPTQ_GROUP = 128, 64, 64

#: Packages that a kind of method needs in addition to the project's, by import name.
PEERS = {
    "nf4": ("bitsandbytes",),
    "hqq": ("hqq",),
    "gptq": ("llmcompressor",),
    "autoround": ("auto_round",),
    "llamacpp": ("gguf",),
}
#: Kinds of methods that are calibrated on text.
CALIBRATED = (
    *("gptq", "autoround", "leanquant", "guided", "llamacpp"),
    *("sketch-normal", "sketch-calibrated", "sketch-healed", "sketch-allocated"),
)
#: llama.cpp's mixtures of types, with the bits of the type that each is named after.
LLAMACPP = {"Q4_K_M": 4, "Q4_0": 4, "IQ4_XS": 4, "Q3_K_M": 3, "IQ3_XXS": 3, "IQ2_XS": 2}
#: Stored bits per weight to allocate: the same as uniform 3 bits, and values between the widths.
TARGETS = (2.5, 3.27, 3.75)
#: Steps of healing, of 1,024 tokens each.
HEAL_STEPS = 300


@dataclass(frozen=True, kw_only=True)
class Method:
    """Describe a method.

    kind: which quantizer, see `quantize.KINDS`. bits: bits of a code; if they are allocated, the
    fewest of the target. groups: tables per row of a sketch. target: bits per weight. mixture:
    llama.cpp's name of a quantization.
    """

    kind: str
    bits: int
    groups: int = 1
    target: float | None = None
    mixture: str | None = None


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
        found[f"guided-{bits}bit"] = Method(kind="guided", bits=bits)
        found[f"hash-{bits}bit-gpr4"] = Method(kind="hash", bits=bits, groups=4)
        for kind in ("sketch", "sketch-normal", "sketch-calibrated", "sketch-healed"):
            for groups in (1, 4):
                name = f"{kind}-{bits}bit-gpr{groups}"
                found[name] = Method(kind=kind, bits=bits, groups=groups)
    for mixture, bits in LLAMACPP.items():
        found[f"llamacpp-{mixture.lower()}"] = Method(kind="llamacpp", bits=bits, mixture=mixture)
    for target in TARGETS:
        found[f"sketch-allocated-{target:g}bit"] = Method(
            kind="sketch-allocated", bits=int(target), target=target
        )
    return found


METHODS = _methods()


def affine_bits(rows: int, columns: int, bits: int, group: int) -> int:
    """Return the bits of a layer of integers with a float16 scale and integer zero per group.

    A zero has as many bits as a code. The last group of a row may be short.
    """
    return rows * (columns * bits + math.ceil(columns / group) * (16 + bits))


def table_bits(rows: int, columns: int, bits: int) -> int:
    """Return the bits of a layer with a float16 table of all code values for every row."""
    return rows * (columns * bits + (16 << bits))
