"""Other projects' quantizers, called layer by layer on the CPU, and what they store.

Each takes a float32 weight [out_features, in_features] and gives it back as it is after being
quantized, with the bytes of the tensors that the package keeps for it. Constants that are the same
for all layers, such as NF4's sixteen values, are not counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quality_methods import HQQ_GROUP


def nf4(weight: Tensor, bits: int) -> tuple[Tensor, int]:
    """NF4 of bitsandbytes in blocks of 64, with scales that are quantized too, as in QLoRA."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    scales = (state.absmax, state.state2.absmax, state.offset)
    stored = sum(tensor.nbytes for tensor in (packed, *scales))
    return functional.dequantize_4bit(packed, state).float(), stored


def hqq(weight: Tensor, bits: int) -> tuple[Tensor, int]:
    """HQQ with its optimizer, in groups along rows, scales and zeros in float16."""
    from hqq.core.quantize import Quantizer

    packed, meta = Quantizer.quantize(
        weight,
        nbits=bits,
        group_size=HQQ_GROUP,
        axis=1,
        device="cpu",
        compute_dtype=torch.float32,
    )
    kept: dict[str, Any] = {name: meta[name].to(torch.float16) for name in ("scale", "zero")}
    stored = sum(tensor.nbytes for tensor in (packed, *kept.values()))
    widened = {name: tensor.float() for name, tensor in kept.items()}
    return Quantizer.dequantize(packed, meta | widened).float(), stored
