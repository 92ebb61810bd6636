"""Decode sketches with NumPy alone, as formats/SPEC.md describes them."""

import hashlib
import json
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def tensors_of(folder):
    """Return every tensor of a checkpoint by name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def modules_of(folder):
    """Return the sketched modules of a checkpoint: name, description, index map, and tables."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = tensors_of(folder)
    for name, module in config["modules"].items():
        tensor = name if "experts" in module else f"{name}.weight"
        yield name, module, tensor, tensors[tensor], tensors[f"{tensor}_table"]


def decode(module, index_map, table, seed=0):
    """Return the weight of a module, float32 [experts, out_features, in_features]."""
    rows = module["out_features"] * module.get("experts", 1)
    columns, bits, groups = module["in_features"], module["bits"], module["groups_per_row"]
    if index_map.numel():
        packed = index_map.numpy().reshape(rows, -1)
        stream = np.unpackbits(packed, axis=1, bitorder="little")
        assert not stream[:, columns * bits :].any(), "padding bits are set"
        codes = stream[:, : columns * bits].reshape(rows, columns, bits) @ (1 << np.arange(bits))
    else:
        keys = _mix(np.arange(rows, dtype=np.uint32) ^ _mix(np.uint32(seed)))
        codes = _mix(np.arange(columns, dtype=np.uint32) ^ keys[:, None]) % (1 << bits)
    group = np.arange(columns) // (columns // groups)
    tables = table.float().numpy().reshape(rows, groups, 1 << bits)
    weight = torch.from_numpy(tables[np.arange(rows)[:, None], group, codes])
    return weight.reshape(-1, module["out_features"], columns)


def _mix(x):
    x = x ^ x >> 16
    x = x * np.uint32(0x21F0AAAD)
    x = x ^ x >> 15
    x = x * np.uint32(0xD35A2D97)
    return x ^ x >> 15


def decoded_weights(folder):
    """Return the dense weights of all sketched modules in the source's layout, by tensor.

    Experts that the source stores below each other are stacked.
    """
    found = {}
    for _, module, tensor, index_map, table in modules_of(folder):
        weight = decode(module, index_map, table)
        weight = weight.transpose(1, 2) if module.get("transposed") else weight
        found[tensor] = (weight if "experts" in module else weight[0]).contiguous()
    return found


def save_decoded(sketched, source, folder):
    """Save the dense model that a sketched one stands for, as its source is stored."""
    dense, kept = tensors_of(source), tensors_of(sketched)
    for name, weight in decoded_weights(sketched).items():
        stacked = weight.ndim == 3 and dense[name].ndim == 2  # experts below each other
        decoded = weight.reshape(-1, weight.shape[2]) if stacked else weight
        assert decoded.shape == dense[name].shape, f"{name} has the shape {list(decoded.shape)}"
        dense[name] = decoded
        del kept[name], kept[f"{name}_table"]
    for name, tensor in kept.items():
        assert torch.equal(tensor, dense[name]), f"{name} differs from the source"
    folder.mkdir()
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", folder)
    return folder


def fingerprint(folder):
    """Return the fingerprint of a checkpoint's index maps."""
    lines = []
    for name, module, _, index_map, _ in sorted(modules_of(folder), key=lambda found: found[0]):
        rows = module["out_features"] * module.get("experts", 1)
        sizes = [rows, module["in_features"], module["bits"], module["groups_per_row"]]
        digest = hashlib.sha256(index_map.numpy().tobytes()).hexdigest()
        lines.append(" ".join(map(str, [name, *sizes, digest])) + "\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
