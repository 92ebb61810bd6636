"""Tiny models of many architectures go all the way: no wrong number, training, saving, loading.

A few architectures of different kinds run always. `SPALLM_TEST_REACH=all` runs all of them.
"""

import json
import os
import time

import numpy as np
import pytest
import torch

from helpers import reach
from helpers.architectures import ARCHITECTURES, available
from helpers.decoded import decoded_weights, save_decoded, tensors_of
from helpers.reach import limited_reach, read_records, sketched_share
from helpers.reach_known import FAULTS, SHARES
from helpers.reach_page import LEAST_SHARE, PAGE, page
from spallm_convert import SketchConfig, convert, plan_conversion
from test_imports import ROOT

SELECTED = (
    "LlamaForSequenceClassification",
    "Gemma2ForCausalLM",
    "GPT2LMHeadModel",
    "MixtralForCausalLM",
    "GptOssForCausalLM",
    "MambaForCausalLM",
    "ModernBertForMaskedLM",
    "T5ForConditionalGeneration",
    "WhisperForConditionalGeneration",
    "ViTModel",
    "CLIPModel",
    "Qwen2VLForConditionalGeneration",
)
NAMES = ARCHITECTURES if os.environ.get("SPALLM_TEST_REACH") == "all" else SELECTED
#: Largest difference between two orders of the same float32 sums, relative to the largest output.
TOLERANCE = 1e-4
MODEL = "LlamaForCausalLM"


@pytest.fixture(scope="module", params=[name for name in NAMES if available(name)])
def found(request, tmp_path_factory):
    """The record of an architecture."""
    return reach.reach(request.param, tmp_path_factory.mktemp("reach"), calibrate=False)


def least_share(record):
    return SHARES.get(record.name, (LEAST_SHARE, ""))[0]


def faults(record):
    """Return what is wrong with a model that was converted."""
    if record.failure is not None:
        return [record.failure]
    wrong = [] if record.difference < TOLERANCE else [f"differs by {record.difference}"]
    return wrong + [reason for reason in (record.trained, record.saved) if reason != "yes"]


def assert_reached(record):
    """Check a record: as many weights as expected are sketched, and all that is done is right."""
    assert (record.share or 0) >= least_share(record), record.dense or record.failure
    if record.share is not None and record.name not in FAULTS:
        assert faults(record) == []


def test_an_architecture_goes_all_the_way(found):
    assert_reached(found)


def test_the_page_is_that_of_the_records():
    assert PAGE.read_text() == page(*read_records())


def test_the_records_are_of_all_architectures_and_good():
    version, records = read_records()
    assert version >= "5.23"
    assert [record.name for record in records] == list(ARCHITECTURES)
    for record in records:
        assert_reached(record)


def test_exceptions_are_still_needed():
    """What is sketched whole, or right, by now must not be left in the lists."""
    records = {record.name: record for record in read_records()[1]}
    assert {name for name in SHARES if (records[name].share or 0) >= LEAST_SHARE} == set()
    assert {name for name in FAULTS if not faults(records[name])} == set()


def test_a_wrong_number_is_found(tmp_path, monkeypatch):
    """One table entry of 3,000 is changed by a hundredth of the largest one."""
    loaded = reach.load_sketched

    def spoilt(folder, **options):
        model = loaded(folder, **options)
        table = model.model.layers[1].mlp.down_proj.weight_table
        table.data[0, 0, 8] += 0.01 * table.abs().max()
        return model

    monkeypatch.setattr(reach, "load_sketched", spoilt)
    record = reach.reach(MODEL, tmp_path, calibrate=False)
    assert record.difference > TOLERANCE
    assert record.saved != "yes"


def test_an_exception_becomes_the_reason(tmp_path, monkeypatch):
    def fail(*arguments):
        raise ValueError(f"{tmp_path}/source is not liked\nat all")

    monkeypatch.setattr(reach, "convert", fail)
    record = reach.reach(MODEL, tmp_path)
    assert record.failure == "ValueError: source is not liked at all"
    assert record.share == 1
    assert record.trained is None
    assert record.calibrated == record.failure


def test_what_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(reach, "save_tiny", lambda *arguments: time.sleep(60))
    assert limited_reach(MODEL, 0.2).failure == "TimeoutError: takes more than 0.2 s"


def test_the_share_counts_experts_and_no_convolutions(tmp_path):
    source = reach.save_tiny("MambaForCausalLM", tmp_path)
    plan = plan_conversion(source, SketchConfig(effort="fast", groups_per_row=1))
    kept = {name for name in plan.dense_weights if name.endswith(("A_log", "conv1d"))}
    share, dense = sketched_share(plan)
    assert len(kept) == 2
    assert kept & dense.keys() == set()
    assert share + sum(dense.values()) == pytest.approx(1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_decoder_decodes_golden_checkpoints(bits):
    folder = ROOT / f"formats/golden/cluster-{bits}bit"
    (weight,) = decoded_weights(folder).values()
    expected = json.loads((folder / "dense.json").read_text())
    np.testing.assert_array_equal(weight, np.float32(expected))


def save_sketch(folder, tensors, **shape):
    from safetensors.torch import save_file

    folder.mkdir()
    module = {"in_features": 4, "out_features": 2, "bits": 2, "groups_per_row": 2} | shape
    config = {"mapping": "cluster", "modules": {"layer": module}}
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file(tensors, folder / "model.safetensors")


def test_the_decoder_decodes_experts_and_transposed_weights(tmp_path):
    """Codes 0, 1, 2, 3 in the first row, 3, 2, 1, 0 in the second; two columns share a table."""
    codes = torch.zeros(2, 16, dtype=torch.uint8)
    codes[:, 0] = torch.tensor([0b11100100, 0b00011011])
    table = torch.arange(16.0).reshape(2, 2, 4)
    dense = np.array([[0, 1, 6, 7], [11, 10, 13, 12]])
    save_sketch(tmp_path / "a", {"layer.weight": codes, "layer.weight_table": table})
    assert (decoded_weights(tmp_path / "a")["layer.weight"].numpy() == dense).all()
    both = {"layer": torch.stack([codes] * 3), "layer_table": torch.stack([table, -table, table])}
    save_sketch(tmp_path / "b", both, experts=3)
    experts = np.stack([dense, -dense, dense])
    assert (decoded_weights(tmp_path / "b")["layer"].numpy() == experts).all()
    save_sketch(tmp_path / "c", both, experts=3, transposed=True)
    assert (decoded_weights(tmp_path / "c")["layer"].numpy() == experts.transpose(0, 2, 1)).all()


def test_a_changed_tensor_that_is_not_sketched_is_found(tmp_path):
    from safetensors.torch import save_file

    source = reach.save_tiny(MODEL, tmp_path / "source")
    convert(source, tmp_path / "out", SketchConfig(effort="fast", groups_per_row=1))
    tensors = tensors_of(tmp_path / "out")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match=r"model\.norm\.weight differs from the source"):
        save_decoded(tmp_path / "out", source, tmp_path / "decoded")
