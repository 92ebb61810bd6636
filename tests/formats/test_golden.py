"""The format matches the golden files byte for byte; broken checkpoints give their errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fuzz.reader import dense_weight, read_folder
from spallm_formats import FormatError, SketchedCheckpoint, build_header, pack, unpack
from spallm_kernels import dequantize

FORMATS = Path(__file__).parents[2] / "formats"
GOLDEN = sorted(path.parent for path in FORMATS.glob("golden/*/config.json"))
HOSTILE = sorted(path.parent for path in FORMATS.glob("hostile/*/error.txt"))


def test_the_fixtures_are_there():
    assert {folder.name for folder in GOLDEN} == {
        *(f"cluster-{bits}bit" for bits in (2, 3, 4)),
        *(f"experts-{kind}-3bit" for kind in ("apart", "cluster", "hash", "transposed")),
        "hash-3bit",
        "transposed-3bit",
    }
    assert len(HOSTILE) >= 50


def expected_weights(folder, modules):
    """Return the dense weights of a golden checkpoint by module, with a row per output."""
    dense = json.loads((folder / "dense.json").read_text())
    by_module = dense if isinstance(dense, dict) else dict.fromkeys(modules, dense)
    assert set(by_module) == set(modules)
    weights = {}
    for name, module in modules.items():
        weight = torch.tensor(by_module[name])
        weights[name] = weight.mT if module.get("transposed") else weight
    return weights


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_golden_decodes_from_the_specification_alone(folder):
    config = json.loads((folder / "config.json").read_text())
    expected = expected_weights(folder, config["quantization_config"]["modules"])
    tensors = read_folder(folder)
    for name, weight in expected.items():
        assert torch.equal(dense_weight(tensors, config, name), weight)


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_golden_decodes_to_its_dense_weights(folder, backend):
    checkpoint = SketchedCheckpoint.open(folder)
    metadata = checkpoint.metadata
    expected = expected_weights(folder, metadata.to_json()["modules"])
    for name, module in metadata.modules.items():
        index_map = torch.from_numpy(checkpoint.index_map(name).copy())
        table = torch.from_numpy(checkpoint.table(name))
        leading = index_map.shape[:-2]
        assert leading == (() if module.experts is None else (module.experts,))
        for expert in np.ndindex(leading):
            dense = dequantize(
                index_map[expert],
                table[expert],
                module.in_features,
                hash_seed=metadata.hash_seed if metadata.mapping == "hash" else None,
                backend=backend,
            )
            assert torch.equal(dense, expected[name][expert])
    assert list(checkpoint.deep_problems()) == []


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_golden_is_written_byte_for_byte(folder):
    checkpoint = SketchedCheckpoint.open(folder)
    contents = {"model.norm.weight": np.arange(5, dtype=np.float32)}
    for name, module in checkpoint.metadata.modules.items():
        index_map = checkpoint.index_map(name)
        if checkpoint.metadata.mapping == "cluster":
            packed = index_map.reshape(module.rows, -1)
            codes = unpack(packed, module.bits, module.in_features)
            index_map = pack(codes, module.bits).reshape(index_map.shape)
        contents[module.index_map_name(name)] = index_map
        contents[module.table_name(name)] = checkpoint.table(name)
    header, offsets = build_header(list(checkpoint.tensors.values()))
    written = bytearray(header)
    for tensor in sorted(offsets, key=lambda tensor: (offsets[tensor], contents[tensor].nbytes)):
        assert offsets[tensor] == len(written)
        written += contents[tensor].tobytes()
    assert bytes(written) == (folder / "model.safetensors").read_bytes()


def test_config_round_trips():
    for folder in GOLDEN:
        config = json.loads((folder / "config.json").read_text())
        metadata = SketchedCheckpoint.open(folder).metadata
        assert metadata.to_json() == config["quantization_config"]


@pytest.mark.parametrize("folder", HOSTILE, ids=lambda folder: folder.name)
def test_hostile_is_refused_with_its_error(folder):
    expected = (folder / "error.txt").read_text().strip()
    try:
        problems = list(SketchedCheckpoint.open(folder).deep_problems())
    except FormatError as error:
        problems = error.problems
    assert any(expected in problem for problem in problems), problems


def test_several_problems_are_reported_together(tmp_path):
    config = json.loads((GOLDEN[0] / "config.json").read_text())
    config["quantization_config"] |= {"mapping": "guess", "surprise": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError) as caught:
        SketchedCheckpoint.open(tmp_path)
    assert len(caught.value.problems) == 2
