"""Find weights in FP8 with scales per block, row or tensor, and FP4 in the same layout.

Methods `fp8` (DeepSeek, Qwen, MiniMax, Mistral), `mxfp8` and `fbgemm_fp8` of transformers. Names of
scales differ: `X.weight_scale_inv` is the usual one, and it is multiplied by in spite of its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spallm_formats import StoredTensor

from .building import Found, block_size, scaled
from .encodings import FP4, FP8, Encoding

#: Ends of the names of scales, and what the name of the weight ends in instead.
_SCALES = (
    ("_scale_inv", ""),
    (".qscale_weight", ".weight"),  # Mistral
    (".scale", ".weight"),  # DeepSeek V4
    ("_scale", ""),  # fbgemm
)


def find_fp8(
    tensors: Mapping[str, StoredTensor], description: Mapping[str, Any], dtype: str
) -> Found:
    """Find the weights that are stored in FP8, or in pairs of FP4.

    Args:
        tensors: Every tensor of the checkpoint, by name.
        description: The description of the quantization in the config.
        dtype: The dtype of dense weights.
    """
    found = Found()
    block = block_size(description.get("weight_block_size"))
    for scales in tensors.values():
        codes = _codes(scales.name, tensors)
        encoding = None if codes is None else _encoding(codes)
        if codes is not None and encoding is not None:
            found.add(scaled(codes.name, codes, encoding, scales, dtype, block=block))
    return found


def _codes(name: str, tensors: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """Return the tensor that scales of a name belong to, None if there is none."""
    for end, instead in _SCALES:
        if name.endswith(end):
            return tensors.get(name.removesuffix(end) + instead)
    return None


def _encoding(codes: StoredTensor) -> Encoding | None:
    """Return the encoding of a tensor, None if it is not quantized."""
    return FP4 if codes.dtype == "I8" else FP8.get(codes.dtype)
