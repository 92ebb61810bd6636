"""Make small checkpoints with quantized weights, and the dense checkpoints that they stand for.

The dense values are computed with torch, independently of the code under test. Scales are powers of
two where the dense checkpoint must hold the values exactly in bfloat16.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

#: The values of FP4, by code.
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

#: Makes stored tensors by the end of their name, and the dense weight, from a weight.
Quantize = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def spread(scales: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """Repeat each scale over its block, and cut what lies outside of the weight."""
    wide = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., : shape[-2], : shape[-1]]


def powers(*shape: int) -> Tensor:
    """Random powers of two, such as small weights have as scales."""
    return 2.0 ** torch.randint(-9, -5, shape)


def fp8_blocks(block: tuple[int, int]) -> Quantize:
    """FP8 with a scale per block; blocks at the edges may be smaller."""

    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        counts = [-(-size // width) for size, width in zip(weight.shape, block, strict=True)]
        scales = powers(*counts)
        wide = spread(scales, weight.shape, block)
        codes = (weight.float() / wide).to(torch.float8_e4m3fn)
        return {"": codes, "_scale_inv": scales}, codes.float() * wide

    return quantize


def fp8_rows(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """FP8 with a scale per row, as compressed-tensors stores it."""
    scales = powers(len(weight), 1)
    codes = (weight.float() / scales).to(torch.float8_e4m3fn)
    return {"": codes, "_scale": scales.bfloat16()}, codes.float() * scales


def fp8_tensor(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """FP8 with one scale, without dimensions."""
    scale = torch.tensor(2.0**-8)
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"": codes, "_scale": scale}, codes.float() * scale


def int8_rows(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """int8 with a scale and a zero point per row."""
    scales = powers(len(weight), 1)
    zeros = torch.randint(-4, 5, scales.shape, dtype=torch.int8)
    codes = (weight.float() / scales).round().clamp(-100, 100).to(torch.int8)
    dense = (codes.float() - zeros.float()) * scales
    return {"": codes, "_scale": scales, "_zero_point": zeros}, dense


def packed_words(codes: Tensor, bits: int) -> Tensor:
    """Pack integers along the last dimension into 32-bit words, first ones lowest."""
    lanes = (codes.long() + (1 << (bits - 1))).reshape(*codes.shape[:-1], -1, 32 // bits)
    words = (lanes << (torch.arange(32 // bits) * bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def packed_groups(bits: int, group: int, *, zeros: bool) -> Quantize:
    """Packed integers with a scale, and perhaps a zero point, per group of columns."""

    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        half = 1 << (bits - 1)
        scales = powers(len(weight), weight.shape[1] // group)
        wide = spread(scales, weight.shape, (1, group))
        codes = (weight.float() / wide).round().clamp(-half, half - 1).to(torch.int8)
        stored = {"_packed": packed_words(codes, bits), "_scale": scales.bfloat16()}
        stored["_shape"] = torch.tensor(weight.shape)
        if not zeros:
            return stored, codes * wide
        points = torch.randint(-half, half, scales.shape)
        stored["_zero_point"] = packed_words(points.T, bits).T.contiguous()
        return stored, (codes - spread(points, weight.shape, (1, group))) * wide

    return quantize


def fp4_pairs(codes: Tensor) -> Tensor:
    """Pack codes of FP4, two in a byte, the first one in the lower half."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def nvfp4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """FP4 in groups of 16, with scales in FP8 and a scale of the whole weight to divide by."""
    scales = powers(len(weight), weight.shape[1] // 16)
    codes = torch.randint(0, 16, weight.shape)
    stored = {
        "_packed": fp4_pairs(codes),
        "_scale": scales.to(torch.float8_e4m3fn),
        "_global_scale": torch.tensor([4.0]),
    }
    return stored, FP4[codes] * spread(scales, weight.shape, (1, 16)) / 4


def mxfp4(experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return random blocks and scales as gpt-oss stores the weights of its experts."""
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    scales = torch.randint(115, 122, (experts, rows, columns // 32), dtype=torch.uint8)
    return blocks, scales


def save_pair(dense: Path, quantize: Quantize, description: dict[str, Any]) -> Path:
    """Save a model with quantized layers next to a dense one; return its folder.

    The dense model gets the values that the quantized one stands for.
    """
    tensors = load_file(dense / "model.safetensors")
    values, stored = dict(tensors), dict(tensors)
    torch.manual_seed(1)
    for name, weight in tensors.items():
        if weight.dim() == 2 and ".layers." in name and ".gate." not in name:
            del stored[name]
            parts, exact = quantize(weight)
            stored |= {name + end: part for end, part in parts.items()}
            values[name] = exact.to(weight.dtype)
            torch.testing.assert_close(values[name].float(), exact, rtol=0, atol=0)
    save_file(values, dense / "model.safetensors", metadata={"format": "pt"})
    return save_quantized(dense, stored, description)


def save_mxfp4(dense: Path) -> Path:
    """Save a gpt-oss with experts in MXFP4 next to a dense one, as `save_pair` does."""
    values = load_file(dense / "model.safetensors")
    stored = dict(values)
    torch.manual_seed(1)
    for name, weight in list(values.items()):
        if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
            del stored[name]
            experts, columns, rows = weight.shape
            blocks, scales = mxfp4(experts, rows, columns)
            stored |= {name + "_blocks": blocks, name + "_scales": scales}
            codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-3).long()
            powers = 2.0 ** (scales.float() - 127)
            exact = FP4[codes] * spread(powers, codes.shape, (1, 32))
            values[name] = exact.transpose(1, 2).to(weight.dtype).contiguous()
    save_file(values, dense / "model.safetensors", metadata={"format": "pt"})
    return save_quantized(dense, stored, {"quant_method": "mxfp4"})


def save_quantized(dense: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> Path:
    """Save quantized tensors with the other files of a dense model; return the folder."""
    folder = dense.with_name(dense.name + "-quantized")
    folder.mkdir()
    for path in dense.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": description}))
    return folder
