"""Tables stay finite in the dtype that the model loads in."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.calibration import StopAt, options, save_source
from helpers.tiny_models import save_tiny_llama
from spallm_convert import (
    CalibrationError,
    SketchConfig,
    SourceError,
    convert,
    load_sketched,
)
from spallm_convert.conversion.verify import verify
from spallm_convert.sketch.limits import loading_limit
from spallm_convert.sketch.rows import store_rows
from spallm_formats import SketchedModule

LAYER = "model.layers.0.mlp.up_proj"


def spoil(folder, dtype, largest, stored=None):
    """Make a weight as large as `largest`; the config says that the model is of `dtype`."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if stored is not None:
        tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    tensors[LAYER + ".weight"][3, 5] = largest
    tensors[LAYER + ".weight"][4, 6] = -largest
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    return folder


@pytest.fixture
def half(tmp_path):
    folder = save_tiny_llama(tmp_path / "source", dtype=torch.float16).folder
    return spoil(folder, "float16", 65504.0)


def check_loads(folder):
    model = load_sketched(folder)
    layer = model.get_submodule(LAYER)
    assert layer.weight_table.dtype == torch.float16
    assert layer.weight_table.isfinite().all()
    assert verify(folder) == []
    return layer.weight_table


@pytest.mark.parametrize("mapping", ["cluster", "hash"])
def test_large_values_are_reduced_to_what_can_be_loaded(half, tmp_path, mapping):
    progress = StopAt()
    config = SketchConfig(effort="fast", mapping=mapping, bits=4, seed=1)
    convert(half, tmp_path / "out", config, progress=progress)
    table = check_loads(tmp_path / "out")
    notes = [line for line in progress.said if "reduced" in line]
    if mapping == "cluster":
        assert table.max() == 65280
        assert table.min() == -65280
        assert notes == [
            f"{LAYER}: 2 table values reduced to 65,280, because the model loads in float16"
        ]


def test_calibrated_and_healed_tables_too(tmp_path, text):
    source = spoil(save_source(tmp_path / "source"), "float16", 65504.0, torch.float16)
    config = options(text, heal=2, table_dtype="bfloat16", bits=4, groups_per_row=1)
    convert(source, tmp_path / "out", config, device="cpu")
    check_loads(tmp_path / "out")


def test_weights_that_do_not_fit_are_refused(tmp_path):
    source = save_tiny_llama(tmp_path / "source").folder
    spoil(source, "float16", 1e5)
    with pytest.raises(SourceError) as caught:
        convert(source, tmp_path / "out")
    for part in (f"'{LAYER}.weight'", "row 3", "float16", "use --table-dtype float32"):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "wide", SketchConfig(effort="fast", table_dtype="float32"))
    assert load_sketched(tmp_path / "wide").get_submodule(LAYER).weight_table.isfinite().all()
    assert verify(tmp_path / "wide") == []


def test_calibration_refuses_them_too(tmp_path, text):
    source = spoil(save_source(tmp_path / "source"), "float16", 1e5)
    with pytest.raises(CalibrationError, match=r"up_proj has weights in row 3 .*float32"):
        convert(source, tmp_path / "out", options(text, table_dtype="bfloat16"), device="cpu")


def test_verify_finds_values_that_cannot_be_loaded(half, tmp_path):
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    convert(half, tmp_path / "out")
    assert verify(tmp_path / "out") == []
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    hashed, found = verify(tmp_path / "out")
    assert "SHA-256" in hashed
    assert LAYER in found
    assert "65,536" in found
    assert not load_sketched(tmp_path / "out").get_submodule(LAYER).weight_table.isfinite().all()


@pytest.mark.parametrize(
    ("config", "stored", "table_dtype", "largest"),
    [
        ({"dtype": "float16"}, {"BF16"}, "bfloat16", 65280),
        ({"dtype": "float16"}, {"BF16"}, "float16", 65504),
        ({"dtype": "float16"}, {"F16"}, "float32", None),
        ({"torch_dtype": "float16"}, {"BF16"}, "bfloat16", 65280),
        ({"torch_dtype": "torch.float16"}, set(), "bfloat16", 65280),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, {"F16"}, "bfloat16", None),
        ({"text_config": {"dtype": "float16"}}, {"BF16"}, "bfloat16", 65280),
        ({"dtype": "float32", "text_config": {"dtype": "float16"}}, {"F16"}, "bfloat16", None),
        ({"dtype": None, "text_config": None}, {"F32", "F16"}, "bfloat16", 65280),
        ({"dtype": 7, "text_config": []}, {"F32"}, "bfloat16", None),
    ],
)
def test_the_limit_follows_the_dtype_of_the_model(config, stored, table_dtype, largest):
    limit = loading_limit(config, stored, table_dtype)
    assert (limit and limit.largest_entry) == largest


def test_codes_are_chosen_for_the_reduced_values():
    limit = loading_limit({"dtype": "float16"}, set(), "bfloat16")
    seen = []

    def choose(rounded):
        seen.append(rounded.copy())
        return np.zeros((1, 4), np.uint8)

    module = SketchedModule(in_features=4, out_features=1, bits=1, groups_per_row=1)
    metadata = type("Metadata", (), {"table_dtype": "bfloat16", "mapping": "cluster"})
    weights = np.full((1, 4), 65504, np.float32)
    table = np.array([[[65504, -65504]]], np.float32)
    rows = store_rows(weights, table, choose, module, metadata, limit=limit)
    assert seen[0].tolist() == rows.rounded.tolist() == [[[65280, -65280]]]
    assert rows.reduced == 2
