"""The modules in `quantization_config`: their keys, names and sizes."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from spallm_formats import (
    FormatError,
    SketchedCheckpoint,
    SketchedModule,
    SketchMetadata,
    fingerprint,
    map_digest,
    reader,
)

FORMATS = Path(__file__).parents[2] / "formats"
LAYER = {"in_features": 20, "out_features": 6, "bits": 3, "groups_per_row": 2}
EXPERTS = LAYER | {"experts": 3}
LARGEST = 2**31 - 1


def document(**modules):
    return {
        "quant_method": "spallm",
        "format_version": 1,
        "bits": max((module["bits"] for module in modules.values()), default=0),
        "mapping": "cluster",
        "hash_seed": 0,
        "table_dtype": "float32",
        "modules": modules,
    }


def problems(**modules):
    with pytest.raises(FormatError) as caught:
        SketchMetadata.from_json(document(**modules))
    return caught.value.problems


def test_optional_keys_are_written_only_if_they_say_something():
    modules = {
        "a": LAYER,
        "b": LAYER | {"transposed": True},
        "c": EXPERTS,
        "d": EXPERTS | {"transposed": True},
        "e": LAYER | {"experts": 1},
    }
    metadata = SketchMetadata.from_json(document(**modules))
    assert metadata.to_json() == document(**modules)
    assert [module.rows for module in metadata.modules.values()] == [6, 6, 18, 18, 6]


@pytest.mark.parametrize(
    ("mapping", "packed"), [("cluster", 16), ("hash", 0)], ids=["cluster", "hash"]
)
def test_experts_have_one_dimension_more(mapping, packed):
    named = {
        "a": (("a.weight", (6, packed)), ("a.weight_table", (6, 2, 8))),
        "a.x": (("a.x", (3, 6, packed)), ("a.x_table", (3, 6, 2, 8))),
    }
    for keys, (name, expected) in zip((LAYER, EXPERTS), named.items(), strict=True):
        specs = SketchedModule(**keys, transposed=True).tensors(name, mapping, "float32")
        assert tuple((spec.name, spec.shape) for spec in specs) == expected


@pytest.mark.parametrize("experts", [0, -1, True, False, None, 2.0, "2", [2], 2**31])
def test_experts_is_a_positive_integer(experts):
    (problem,) = problems(a=LAYER | {"experts": experts})
    assert problem == f"module 'a': experts is {experts!r}, expected 1 to {LARGEST}"


@pytest.mark.parametrize("transposed", [False, None, 0, 1, "true"])
def test_transposed_is_true_or_left_out(transposed):
    (problem,) = problems(a=LAYER | {"transposed": transposed})
    assert problem == f"module 'a': transposed is {transposed!r}, expected true, or no such key"


@pytest.mark.parametrize(
    ("modules", "shared"),
    [
        ({"a": LAYER, "a.weight": EXPERTS}, "a.weight"),
        ({"a.weight": EXPERTS, "a": LAYER}, "a.weight"),
        ({"a": EXPERTS, "a_table": EXPERTS}, "a_table"),
    ],
)
def test_no_two_modules_share_a_tensor(modules, shared):
    (problem,) = problems(**modules)
    first, second = modules
    assert problem.startswith(f"modules {first!r} and {second!r} both have a tensor {shared!r}")


def test_alike_names_that_share_no_tensor_are_accepted():
    modules = {"a": LAYER, "a_table": LAYER, "b": EXPERTS, "b.weight": LAYER, "c.weight": EXPERTS}
    assert len(SketchMetadata.from_json(document(**modules)).tensors()) == 10


def test_only_tables_have_the_reserved_name():
    assert problems(**{"a.weight_table": EXPERTS}) == [
        "module 'a.weight_table': the name of fused experts ends in '.weight_table', which only "
        "tables may have"
    ]
    SketchMetadata.from_json(document(**{"a.weight_table": LAYER}))


@pytest.mark.parametrize(
    "sizes",
    [
        {"in_features": LARGEST - 1, "out_features": LARGEST, "experts": 4},  # the weight
        {"in_features": 1, "groups_per_row": 1, "out_features": LARGEST, "experts": 2**28},  # codes
        {"in_features": 2**30, "groups_per_row": 2**30, "out_features": 2**30},  # tables
    ],
)
def test_sizes_stay_below_the_limit_of_tensors(sizes):
    (problem,) = problems(a=LAYER | sizes)
    assert problem == "module 'a': its shape is too large, expected sizes below 2^63"


def test_the_largest_layer_is_accepted():
    module = LAYER | {"in_features": LARGEST, "out_features": LARGEST, "groups_per_row": 1}
    SketchMetadata.from_json(document(a=module))


def test_every_problem_of_the_names_is_listed():
    modules = {"a": LAYER, "a.weight": EXPERTS, "b": EXPERTS, "b_table": EXPERTS}
    assert len(problems(**modules)) == 2


@pytest.mark.parametrize("name", ["experts-padding-set", "experts-table-not-finite"])
@pytest.mark.parametrize("block", [1, 64, 1 << 20])
def test_data_of_experts_is_checked_in_blocks_of_any_size(monkeypatch, name, block):
    monkeypatch.setattr(reader, "_BLOCK_BYTES", block)
    assert len(list(SketchedCheckpoint.open(FORMATS / "hostile" / name).deep_problems())) == 1
    golden = SketchedCheckpoint.open(FORMATS / "golden" / "experts-cluster-3bit")
    assert list(golden.deep_problems()) == []


def test_a_table_that_becomes_infinite_is_found_in_any_expert(tmp_path):
    folder = shutil.copytree(FORMATS / "golden" / "experts-hash-3bit", tmp_path / "large")
    table = SketchedCheckpoint.open(folder).tensors["model.layers.0.mlp.experts.up_proj_table"]
    data = bytearray((folder / "model.safetensors").read_bytes())
    end = table.offset + table.nbytes
    data[end - 4 : end] = np.float32(70_000).tobytes()
    (folder / "model.safetensors").write_bytes(data)
    (problem,) = SketchedCheckpoint.open(folder).deep_problems(largest=65_504)
    assert "holds 70,000, which is infinite" in problem


def test_the_fingerprint_counts_the_rows_of_all_experts():
    modules = {"b": SketchedModule(**EXPERTS), "a": SketchedModule(**LAYER, transposed=True)}
    digests = {"a": map_digest(np.zeros((6, 16), np.uint8), None), "b": "hash:7"}
    lines = f"a 6 20 3 2 {digests['a']}\nb 18 20 3 2 hash:7\n"
    assert fingerprint(modules, digests) == map_digest(np.frombuffer(lines.encode(), "u1"), None)
