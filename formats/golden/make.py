"""Write the golden checkpoints: python formats/golden/make.py

All values come from small formulas. Files and expected weights are written here with plain loops
and the safetensors library, not with the code that they test.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save

ROWS, COLUMNS, GROUPS = 6, 20, 2
MODULE = "model.layers.0.mlp.up_proj"
SEED = 42


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x21F0AAAD % 2**32
    x ^= x >> 15
    x = x * 0xD35A2D97 % 2**32
    return x ^ x >> 15


def code(row: int, column: int, bits: int, mapping: str) -> int:
    if mapping == "hash":
        return mix(column ^ mix(row ^ mix(SEED))) % 2**bits
    return (7 * row + 3 * column + row * column) % 2**bits


def entry(row: int, group: int, value: int) -> float:
    """Return a multiple of 1/64 below 2 in magnitude, which is exact in every table dtype."""
    return ((131 * row + 17 * group + 29 * value) % 255 - 127) / 64


def packed_row(codes: list[int], bits: int) -> list[int]:
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    row_bytes = 16 * -(-COLUMNS * bits // 128)
    return list(stream.to_bytes(row_bytes, "little"))


def write(folder: Path, bits: int, mapping: str) -> None:
    codes = [[code(o, i, bits, mapping) for i in range(COLUMNS)] for o in range(ROWS)]
    table = [[[entry(o, g, k) for k in range(2**bits)] for g in range(GROUPS)] for o in range(ROWS)]
    dense = [
        [table[o][i // (COLUMNS // GROUPS)][codes[o][i]] for i in range(COLUMNS)]
        for o in range(ROWS)
    ]
    packed = [packed_row(row, bits) if mapping == "cluster" else [] for row in codes]
    tensors = {
        f"{MODULE}.weight": np.array(packed, np.uint8).reshape(ROWS, -1),
        f"{MODULE}.weight_table": np.array(table, np.float32),
        "model.norm.weight": np.arange(5, dtype=np.float32),
    }
    module = {
        "in_features": COLUMNS,
        "out_features": ROWS,
        "bits": bits,
        "groups_per_row": GROUPS,
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": {
            "quant_method": "spallm",
            "format_version": 1,
            "bits": bits,
            "mapping": mapping,
            "hash_seed": SEED,
            "table_dtype": "float32",
            "modules": {MODULE: module},
        },
    }
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "dense.json").write_text(json.dumps(dense) + "\n")


if __name__ == "__main__":
    here = Path(__file__).parent
    for bits in (2, 3, 4):
        write(here / f"cluster-{bits}bit", bits, "cluster")
    write(here / "hash-3bit", 3, "hash")
