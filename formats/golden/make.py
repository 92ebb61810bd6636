"""Write the golden checkpoints: python formats/golden/make.py

All values come from small formulas. Files and expected weights are written here with plain loops
and the safetensors library, not with the code that they test.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save

ROWS, COLUMNS, GROUPS, EXPERTS = 6, 20, 2, 3
MODULE = "model.layers.0.mlp.up_proj"
FUSED = "model.layers.0.mlp.experts.up_proj"
APART = "model.layers.0.mlp.experts.{}.up_proj"
SEED = 42

Dense = list[list[float]]


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x21F0AAAD % 2**32
    x ^= x >> 15
    x = x * 0xD35A2D97 % 2**32
    return x ^ x >> 15


def code(row: int, column: int, bits: int, mapping: str, expert: int = 0) -> int:
    if mapping == "hash":
        return mix(column ^ mix(row ^ mix(SEED))) % 2**bits
    return (7 * row + 3 * column + row * column + 5 * expert) % 2**bits


def entry(row: int, group: int, value: int, expert: int = 0) -> float:
    """Return a multiple of 1/64 below 2 in magnitude, which is exact in every table dtype."""
    return ((131 * row + 17 * group + 29 * value + 53 * expert) % 255 - 127) / 64


def packed_row(codes: list[int], bits: int) -> list[int]:
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    row_bytes = 16 * -(-COLUMNS * bits // 128)
    return list(stream.to_bytes(row_bytes, "little"))


def expert_weight(
    bits: int, mapping: str, expert: int = 0
) -> tuple[list[list[int]], list[Dense], Dense]:
    """Return packed codes, tables and the dense weight of a layer or an expert, by rows."""
    codes = [[code(o, i, bits, mapping, expert) for i in range(COLUMNS)] for o in range(ROWS)]
    table = [
        [[entry(o, g, k, expert) for k in range(2**bits)] for g in range(GROUPS)]
        for o in range(ROWS)
    ]
    dense = [
        [table[o][i // (COLUMNS // GROUPS)][codes[o][i]] for i in range(COLUMNS)]
        for o in range(ROWS)
    ]
    packed = [packed_row(row, bits) if mapping == "cluster" else [] for row in codes]
    return packed, table, dense


def transpose(dense: Dense) -> Dense:
    return [list(column) for column in zip(*dense, strict=True)]


def shape(bits: int, **more: int | bool) -> dict[str, int | bool]:
    features = {"in_features": COLUMNS, "out_features": ROWS}
    return features | {"bits": bits, "groups_per_row": GROUPS} | more


def layer(bits: int, mapping: str, expert: int = 0) -> tuple[dict[str, np.ndarray], Dense]:
    """Return what is stored of a layer, by the ends of the names, and the dense weight."""
    packed, table, dense = expert_weight(bits, mapping, expert)
    tensors = {
        ".weight": np.array(packed, np.uint8).reshape(ROWS, -1),
        ".weight_table": np.array(table, np.float32),
    }
    return tensors, dense


def fused(bits: int, mapping: str) -> tuple[dict[str, np.ndarray], list[Dense]]:
    """Return the same of fused experts."""
    packed, table, dense = zip(
        *(expert_weight(bits, mapping, expert) for expert in range(EXPERTS)), strict=True
    )
    tensors = {
        "": np.array(packed, np.uint8).reshape(EXPERTS, ROWS, -1),
        "_table": np.array(table, np.float32),
    }
    return tensors, list(dense)


def write(
    name: str,
    mapping: str,
    modules: dict[str, dict[str, int | bool]],
    stored: list[dict[str, np.ndarray]],
    dense: object,
) -> None:
    tensors = {
        module + ending: tensor
        for module, parts in zip(modules, stored, strict=True)
        for ending, tensor in parts.items()
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": {
            "quant_method": "spallm",
            "format_version": 1,
            "bits": max(module["bits"] for module in modules.values()),
            "mapping": mapping,
            "hash_seed": SEED,
            "table_dtype": "float32",
            "modules": modules,
        },
    }
    folder = Path(__file__).parent / name
    folder.mkdir(exist_ok=True)
    tensors["model.norm.weight"] = np.arange(5, dtype=np.float32)
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "dense.json").write_text(json.dumps(dense) + "\n")


def write_layers() -> None:
    for name, bits, mapping in (
        ("cluster-2bit", 2, "cluster"),
        ("cluster-3bit", 3, "cluster"),
        ("cluster-4bit", 4, "cluster"),
        ("hash-3bit", 3, "hash"),
    ):
        tensors, dense = layer(bits, mapping)
        write(name, mapping, {MODULE: shape(bits)}, [tensors], dense)
    tensors, dense = layer(3, "cluster")
    module = shape(3, transposed=True)
    write("transposed-3bit", "cluster", {MODULE: module}, [tensors], transpose(dense))


def write_experts() -> None:
    for mapping in ("cluster", "hash"):
        tensors, dense = fused(3, mapping)
        module = shape(3, experts=EXPERTS)
        write(f"experts-{mapping}-3bit", mapping, {FUSED: module}, [tensors], dense)
    tensors, dense = fused(3, "cluster")
    module = shape(3, experts=EXPERTS, transposed=True)
    by_input = [transpose(weight) for weight in dense]
    write("experts-transposed-3bit", "cluster", {FUSED: module}, [tensors], by_input)
    apart = {APART.format(expert): layer(3, "cluster", expert) for expert in range(EXPERTS)}
    write(
        "experts-apart-3bit",
        "cluster",
        {name: shape(3) for name in apart},
        [tensors for tensors, _ in apart.values()],
        {name: dense for name, (_, dense) in apart.items()},
    )


if __name__ == "__main__":
    write_layers()
    write_experts()
