"""Find weights that the library compressed-tensors has quantized: FP8, int8, FP4 and packed ints.

A weight X is stored as `X` or `X_packed`, with `X_scale` and perhaps `X_zero_point`,
`X_global_scale`, `X_g_idx` and `X_shape`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spallm_formats import StoredTensor, shown

from .building import Found, block_size, scaled
from .encodings import FP4, FP8, INT8, PACKED, PACKED_BITS
from .weights import ScaledTensor

_WEIGHT, _PACKED = ".weight", "_packed"
#: Formats in which each weight can be read by itself.
FORMATS = (
    "float-quantized",
    "int-quantized",
    "naive-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)


def unreadable_part(description: Mapping[str, Any]) -> str | None:
    """Return what is in a config of compressed-tensors that cannot be read, None if all can be.

    Args:
        description: The description of the quantization in the config.
    """
    groups = description.get("config_groups")
    if isinstance(groups, dict) and any(not isinstance(group, dict) for group in groups.values()):
        return "groups that are not objects"
    formats = [description.get("format"), *(group.get("format") for group in _groups(description))]
    for name in formats:
        if name is not None and name not in FORMATS:
            return f"format {shown(name)}"
    sparsity = description.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        return f"sparsity {shown(sparsity['format'])}"
    transforms = description.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        return "transforms of the weights"
    return None


def find_compressed(
    tensors: Mapping[str, StoredTensor], description: Mapping[str, Any], dtype: str
) -> Found:
    """Find the weights that compressed-tensors has quantized.

    Args:
        tensors: Every tensor of the checkpoint, by name.
        description: The description of the quantization in the config.
        dtype: The dtype of dense weights.
    """
    found = Found()
    for codes in tensors.values():
        name = codes.name.removesuffix(_PACKED)
        scales = tensors.get(name + "_scale")
        if not name.endswith(_WEIGHT):
            continue
        if scales is None:
            if name != codes.name:
                found.add(f"{codes.file.name}: tensor {shown(codes.name)} has no scales")
        elif name != codes.name:
            found.add(_packed(name, codes, scales, tensors, description, dtype))
        elif codes.dtype == "I8" or codes.dtype in FP8:
            encoding = FP8.get(codes.dtype, INT8)
            more = _zero_points(name, tensors, None)
            block = _block(codes, scales, description)
            found.add(scaled(name, codes, encoding, scales, dtype, block=block, **more))
    return found


def _packed(
    name: str,
    codes: StoredTensor,
    scales: StoredTensor,
    tensors: Mapping[str, StoredTensor],
    description: Mapping[str, Any],
    dtype: str,
) -> ScaledTensor | str:
    """Describe a weight whose codes are packed: pairs of FP4, or integers in 32-bit words."""
    more: dict[str, Any] = {}
    if codes.dtype == "U8":
        common = tensors.get(name + "_global_scale")
        if common is not None:
            more = {"common": common, "divides": True}
        return scaled(name, codes, FP4, scales, dtype, **more)
    where = f"{codes.file.name}: tensor {shown(codes.name)}"
    if codes.dtype != "I32" or len(codes.shape) != 2:
        return f"{where} is {codes.dtype} {list(codes.shape)}, expected U8, or a matrix of I32"
    widths = _widths(codes, scales, description)
    if len(widths) != 1:
        return f"{where} has {sorted(widths)} bits by its config, expected one of {PACKED_BITS}"
    (bits,) = widths
    order = tensors.get(name + "_g_idx")
    if order is not None:
        more["order"] = order
    more |= _zero_points(name, tensors, bits)
    return scaled(name, codes, PACKED[bits], scales, dtype, **more)


def _widths(codes: StoredTensor, scales: StoredTensor, description: Mapping[str, Any]) -> set[int]:
    """Return the bits that a packed weight may have, by the groups of the config.

    Configs may give some layers more bits than others. A group that does not fit the shapes of the
    weight is another layer's.
    """
    found = set()
    for weights in _weight_schemes(description):
        bits, size = weights.get("num_bits"), weights.get("group_size")
        if weights.get("type", "int") != "int" or bits not in PACKED_BITS:
            continue
        columns = codes.shape[-1] * 32 // bits
        in_groups = type(size) is int and size > 0
        expected = -(-columns // size) if in_groups else 1
        if scales.shape[-1:] == (expected,) or not scales.shape:
            found.add(bits)
    return found


def _block(
    codes: StoredTensor, scales: StoredTensor, description: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Return the rows and columns of a block, None if there is a scale per row or tensor."""
    if len(codes.shape) < 2 or scales.elements == 1:
        return None
    for weights in _weight_schemes(description):
        block = block_size(weights.get("block_structure"))
        if block and scales.shape[-1:] == (-(-codes.shape[-1] // block[1]),):
            return block
    return None


def _zero_points(
    name: str, tensors: Mapping[str, StoredTensor], bits: int | None
) -> dict[str, Any]:
    """Return the fields of `Scales` for zero points, none if the weight has none."""
    zero_points = tensors.get(name + "_zero_point")
    if zero_points is None:
        return {}
    return {
        "zero_points": zero_points,
        "zero_bits": bits if zero_points.dtype == "I32" else None,
    }


def _weight_schemes(description: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield how the groups of a config quantize weights."""
    for group in _groups(description):
        weights = group.get("weights")
        if isinstance(weights, dict):
            yield weights


def _groups(description: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = description.get("config_groups")
    return list(groups.values()) if isinstance(groups, dict) else []
