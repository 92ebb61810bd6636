"""The format matches the golden files byte for byte; broken checkpoints give their errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from spallm_formats import FormatError, SketchedCheckpoint, build_header, pack, unpack
from spallm_kernels import dequantize

FORMATS = Path(__file__).parents[2] / "formats"
GOLDEN = sorted(path.parent for path in FORMATS.glob("golden/*/config.json"))
HOSTILE = sorted(path.parent for path in FORMATS.glob("hostile/*/error.txt"))


def test_the_fixtures_are_there():
    names = {folder.name for folder in GOLDEN}
    assert names == {"cluster-2bit", "cluster-3bit", "cluster-4bit", "hash-3bit"}
    assert len(HOSTILE) >= 30


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_golden_decodes_to_its_dense_weights(folder, backend):
    checkpoint = SketchedCheckpoint.open(folder)
    ((name, module),) = checkpoint.metadata.modules.items()
    seed = checkpoint.metadata.hash_seed if checkpoint.metadata.mapping == "hash" else None
    dense = dequantize(
        torch.from_numpy(checkpoint.index_map(name).copy()),
        torch.from_numpy(checkpoint.table(name)),
        module.in_features,
        hash_seed=seed,
        backend=backend,
    )
    assert dense.tolist() == json.loads((folder / "dense.json").read_text())
    assert list(checkpoint.deep_problems()) == []


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_golden_is_written_byte_for_byte(folder):
    checkpoint = SketchedCheckpoint.open(folder)
    ((name, module),) = checkpoint.metadata.modules.items()
    index_map = checkpoint.index_map(name)
    if checkpoint.metadata.mapping == "cluster":
        index_map = pack(unpack(index_map, module.bits, module.in_features), module.bits)
    contents = {
        name + ".weight": index_map,
        name + ".weight_table": checkpoint.table(name),
        "model.norm.weight": np.arange(5, dtype=np.float32),
    }
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
