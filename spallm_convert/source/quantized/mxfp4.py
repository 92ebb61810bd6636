"""Find experts in MXFP4, as in gpt-oss: FP4 in groups of 32 with a power of two as their scale.

`X_blocks`, U8 [experts, out, groups, 16], and `X_scales`, U8 [experts, out, groups], stand for the
weight X [experts, in, out] of the model, transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from spallm_formats import StoredTensor, shown

from .building import Found, scaled
from .encodings import FP4
from .weights import ScaledTensor, TransposedTensor

_BLOCKS, _SCALES = "_blocks", "_scales"


def find_mxfp4(
    tensors: Mapping[str, StoredTensor], description: Mapping[str, Any], dtype: str
) -> Found:
    """Find the weights that are stored in MXFP4.

    Args:
        tensors: Every tensor of the checkpoint, by name.
        description: The description of the quantization in the config. Nothing in it is needed.
        dtype: The dtype of dense weights.
    """
    found = Found()
    for blocks in tensors.values():
        name = blocks.name.removesuffix(_BLOCKS)
        if name == blocks.name or blocks.dtype != "U8":
            continue
        scales = tensors.get(name + _SCALES)
        if scales is None or blocks.shape[:-1] != scales.shape or len(scales.shape) != 3:
            fits = "none" if scales is None else str(list(scales.shape))
            found.add(
                f"{blocks.file.name}: tensor {shown(blocks.name)} {list(blocks.shape)} does not "
                f"fit its scales {shown(name + _SCALES)} ({fits})"
            )
            continue
        found.add(_transposed(name, blocks, scales, dtype))
    return found


def _transposed(
    name: str, blocks: StoredTensor, scales: StoredTensor, dtype: str
) -> TransposedTensor | str:
    experts, out_features, groups, group_bytes = blocks.shape
    codes = replace(blocks, shape=(experts, out_features, groups * group_bytes))
    packed = scaled(name, codes, FP4, scales, dtype)
    if not isinstance(packed, ScaledTensor):
        return packed
    shape = (experts, packed.shape[-1], out_features)
    return TransposedTensor(name, dtype, shape, blocks.file, blocks.offset, packed)
