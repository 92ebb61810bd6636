"""Read checkpoints from the text of formats/SPEC.md alone, with none of the project's code.

What a model holds after loading is compared with what this reader finds in the files. It trusts the
files: it is used on those that were accepted.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

_TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            dtype = _TORCH[entry["dtype"]]
            values = torch.frombuffer(bytearray(data[begin:end]) or bytearray(16), dtype=dtype)
            found[name] = values[: 0 if begin == end else None].reshape(entry["shape"])
    return found


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint, sharded or not."""
    single = folder / "model.safetensors"
    if single.exists():
        return read_file(single)
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    found: dict[str, torch.Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        found |= read_file(folder / name)
    return found


def dense_weight(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], name: str
) -> torch.Tensor:
    """Return the dense weight of a sketched module, in the dtype of its tables.

    It has a row per output. Fused experts have one dimension more, in front.
    """
    sketch = config["quantization_config"]
    module = sketch["modules"][name]
    rows, columns, bits = module["out_features"], module["in_features"], module["bits"]
    stored = name if "experts" in module else f"{name}.weight"
    packed, table = tensors[stored].numpy(), tensors[f"{stored}_table"]
    if sketch["mapping"] == "hash":
        codes = np.zeros((*packed.shape[:-1], columns), np.int64)
        codes += _hash_codes(rows, columns, sketch["hash_seed"]) % (1 << bits)
    else:
        stream = np.unpackbits(packed, axis=-1, bitorder="little")
        fields = stream[..., : columns * bits].reshape(*packed.shape[:-1], columns, bits)
        codes = (fields.astype(np.int64) << np.arange(bits)).sum(-1)
    group = torch.arange(columns) // (columns // module["groups_per_row"])
    by_row = table.reshape(-1, *table.shape[-2:])
    index_map = torch.from_numpy(codes).reshape(-1, columns)
    weight = by_row[torch.arange(len(by_row))[:, None], group, index_map]
    return weight.reshape(codes.shape)


def _hash_codes(rows: int, columns: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    row = _mix(np.arange(rows, dtype=np.uint64) ^ _mix(np.array(seed, np.uint64)))
    mixed = _mix(np.arange(columns, dtype=np.uint64)[None] ^ row[:, None])
    return mixed.astype(np.int64)


def _mix(x: Any) -> Any:
    x = x ^ (x >> np.uint64(16))
    x = (x * np.uint64(0x21F0AAAD)) & np.uint64(0xFFFFFFFF)
    x = x ^ (x >> np.uint64(15))
    x = (x * np.uint64(0xD35A2D97)) & np.uint64(0xFFFFFFFF)
    return x ^ (x >> np.uint64(15))


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether two tensors are equal after the second is cast; NaN equals NaN."""
    cast = expected.to(found.dtype)
    return found.shape == cast.shape and torch.equal(
        torch.nan_to_num(found, 12345.0) if found.is_floating_point() else found,
        torch.nan_to_num(cast, 12345.0) if cast.is_floating_point() else cast,
    )


def state_problems(model: Any, folder: Path) -> list[str]:
    """Compare a loaded model with the files of its checkpoint.

    Args:
        model: A transformers model.
        folder: Folder of the sketched checkpoint.

    Returns:
        One line per parameter that is not what the files say.
    """
    config = json.loads((folder / "config.json").read_bytes())
    stored = read_folder(folder)
    prefix = model.base_model_prefix + "."

    def own(name: str) -> str | None:
        names = (name, name.removeprefix(prefix), prefix + name)
        return next((n for n in names if n in stored), None)

    problems = []
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, value in model.state_dict().items():
        key = own(name) or own(tied.get(name, ""))
        if key is None:
            problems.append(f"{name} is in no file")
        elif not same(value.detach(), stored[key]):
            problems.append(f"{name} differs from the file")
    layers = {own(path + ".weight_table"): layer for path, layer in model.named_modules()}
    for name in config["quantization_config"]["modules"]:
        layer = layers.get(f"{name}.weight_table")
        if layer is None or not hasattr(layer, "dense_weight"):
            problems.append(f"{name} is not sketched in the model")
        elif not same(layer.dense_weight().detach(), dense_weight(stored, config, name)):
            problems.append(f"{name}: the weight is not what the files say")
    return problems
