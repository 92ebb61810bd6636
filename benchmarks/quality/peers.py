"""Run other projects' quantizers on the CPU.

Quantizers that need no text are called layer by layer. They take a float32 weight [out_features,
in_features] and return the weight after quantization, with the bytes of the tensors that the
package keeps for it. Constants that are the same for all layers, such as NF4's sixteen values, are
not counted. Quantizers that are calibrated take a float32 model and quantize its weights in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .methods import GPTQ_GROUP, HQQ_GROUP, RTN_GROUP


def nf4(weight: Tensor, bits: int) -> tuple[Tensor, int]:
    """Quantize with NF4 of bitsandbytes, blocks of 64, with quantized scales as in QLoRA."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    scales = (state.absmax, state.state2.absmax, state.offset)
    stored = sum(tensor.nbytes for tensor in (packed, *scales))
    return functional.dequantize_4bit(packed, state).float(), stored


def hqq(weight: Tensor, bits: int) -> tuple[Tensor, int]:
    """Quantize with HQQ and its optimizer, in groups along rows, scales and zeros in float16."""
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


def gptq(model: Any, tokenizer: Any, tokens: Tensor, bits: int, seed: int) -> None:
    """Quantize with GPTQ of llm-compressor at its defaults: integers with a zero, in groups.

    tokens: int64 [samples, seqlen].
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=False, strategy="group", group_size=GPTQ_GROUP
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    shown = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict(shown),
        recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
    )


def autoround(model: Any, tokenizer: Any, tokens: Tensor, bits: int, seed: int) -> None:
    """Quantize with AutoRound at its defaults: integers with a zero, in groups.

    The defaults are 200 steps per block, and bfloat16 if the CPU has it. tokens: int64 [samples,
    seqlen].
    """
    from auto_round import AutoRound

    shown: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    AutoRound(
        model,
        tokenizer,
        bits=bits,
        group_size=RTN_GROUP,
        sym=False,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=torch.utils.data.DataLoader(shown, batch_size=8),
        seed=seed,
        device_map="cpu",
        low_cpu_mem_usage=False,
        enable_torch_compile=False,
    ).quantize()
