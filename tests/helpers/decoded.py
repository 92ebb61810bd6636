"""Decode a sketched checkpoint with NumPy alone, as SPEC.md says."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

_DTYPES = {"U8": np.uint8, "F16": np.float16, "F32": np.float32}


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the weight files of a checkpoint, by name."""
    files = sorted(folder.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def decoded_weights(folder: Path) -> dict[str, np.ndarray]:
    """Decode the weights of all sketched modules.

    Args:
        folder: A sketched checkpoint with the mapping "cluster".

    Returns:
        The dense weights in float32, in the shapes of the source, by the name of the tensor.
    """
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["mapping"] == "cluster"
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= _read(file)
    found = {}
    for module, shape in config["modules"].items():
        name = module + ".weight" if module + ".weight" in tensors else module
        codes, table = tensors[name], tensors[name + "_table"]
        experts = shape.get("experts")
        if experts is None:
            dense = _decode(codes, table, shape)
        else:
            assert len(codes) == len(table) == experts
            dense = np.stack([_decode(c, t, shape) for c, t in zip(codes, table, strict=True)])
        found[name] = dense.swapaxes(-1, -2).copy() if shape.get("transposed") else dense
    return found


def save_decoded(source: Path, sketched: Path, folder: Path) -> Path:
    """Save a copy of a dense checkpoint that has the weights of its sketch.

    Args:
        source: The dense checkpoint.
        sketched: Its sketch.
        folder: Where to save the copy.

    Returns:
        The folder of the copy. Names, shapes and all other tensors are the source's.

    Raises:
        AssertionError: A tensor that is not sketched differs from the source's, or a decoded weight
            does not have the shape of the source's.
    """
    dense, kept = stored_tensors(source), stored_tensors(sketched)
    for name, weight in decoded_weights(sketched).items():
        experts_below_each_other = weight.ndim == 3 and dense[name].ndim == 2
        decoded = weight.reshape(-1, weight.shape[2]) if experts_below_each_other else weight
        assert decoded.shape == dense[name].shape, f"{name} has the shape {decoded.shape}"
        dense[name] = torch.from_numpy(decoded)
        del kept[name], kept[name + "_table"]
    for name, tensor in kept.items():
        assert torch.equal(tensor, dense[name]), f"{name} differs from the source"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _read(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file that NumPy has a type for; BF16 becomes float32."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        raw = data[start + first : start + last]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] in _DTYPES:
            values = np.frombuffer(raw, _DTYPES[entry["dtype"]])
        else:
            continue
        found[name] = values.reshape(entry["shape"])
    return found


def _decode(codes: np.ndarray, table: np.ndarray, shape: dict[str, Any]) -> np.ndarray:
    """Decode one matrix, [rows, bytes] and [rows, groups, entries] to [rows, columns]."""
    columns, bits, groups = shape["in_features"], shape["bits"], shape["groups_per_row"]
    assert codes.shape == (shape["out_features"], 16 * -(-columns * bits // 128))
    stream = np.unpackbits(codes, axis=1, bitorder="little")
    assert not stream[:, columns * bits :].any(), "padding bits are set"
    split = stream[:, : columns * bits].reshape(len(codes), columns, bits)
    numbers = np.packbits(split, axis=2, bitorder="little")[:, :, 0]
    rows, group = np.arange(len(codes))[:, None], np.arange(columns) // (columns // groups)
    return table.astype(np.float32)[rows, group[None], numbers]
