"""A quantized source gives the same sketch as the dense model that its weights stand for."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import GptOssConfig, GptOssForCausalLM

from helpers import quantized_models as models
from helpers.architectures import save_tiny
from helpers.calibration import calibrated, contents
from helpers.remarks import Remarks
from helpers.tiny_models import save_tiny_llama
from spallm_convert import Report, SketchConfig, convert, load_sketched, plan_conversion, verify
from spallm_convert.source.quantized import weights

BLOCKS = {"quant_method": "fp8", "weight_block_size": [48, 40], "modules_to_not_convert": ["x"]}
GROUPS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
}
#: Files that name the source.
NAMED = {"conversion.json", "README.md"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A dense Llama, and the same in ragged blocks of FP8."""
    dense = save_tiny_llama(tmp_path_factory.mktemp("pair") / "llama").folder
    return dense, models.save_pair(dense, models.fp8_blocks((48, 40)), BLOCKS)


def same(first, second):
    """The files of two checkpoints that do not name the source are equal."""
    one, other = (contents(folder) for folder in (first, second))
    assert one.keys() == other.keys()
    assert [name for name in one.keys() - NAMED if one[name] != other[name]] == []


def test_fp8_gives_the_bytes_of_the_dense_model(pair, tmp_path):
    dense, quantized = pair
    remarks = Remarks()
    report = convert(quantized, tmp_path / "out", SketchConfig(effort="fast"), progress=remarks)
    scheme = "FP8 in blocks of 48 x 40"
    assert remarks.lines == [
        f"the source is quantized ({scheme}): its weights are dequantized as they are read"
    ]
    convert(dense, tmp_path / "expected", SketchConfig(effort="fast"))
    same(tmp_path / "out", tmp_path / "expected")
    assert report.document["source_quantization"] == {
        "method": "fp8",
        "scheme": scheme,
        "weights": 14,
        "stored_bytes": sum(t.nbytes for t in load_file(quantized / "model.safetensors").values()),
        "dropped": 0,
    }
    assert Report.read(tmp_path / "out") == report
    card = (tmp_path / "out/README.md").read_text()
    assert f"| weights of the source | {scheme}, dequantized before sketching |\n" in card
    assert "| size | 0.1 MB, was 0.1 MB quantized, dense 0.2 MB |" in card
    assert verify(tmp_path / "out") == []
    again = convert(quantized, tmp_path / "out", SketchConfig(effort="fast"), resume=True)
    assert again == report


def test_layers_that_stay_dense_are_written_dequantized(pair, tmp_path):
    dense, quantized = pair
    config = SketchConfig(effort="fast", ignore=("*.q_proj", "*.down_proj"), bits=2)
    convert(quantized, tmp_path / "out", config)
    convert(dense, tmp_path / "expected", config)
    same(tmp_path / "out", tmp_path / "expected")
    loaded = load_sketched(tmp_path / "out")
    assert loaded.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


def test_packed_integers_give_the_bytes_of_the_dense_model(tmp_path):
    dense = save_tiny_llama(tmp_path / "llama").folder
    quantized = models.save_pair(dense, models.packed_groups(4, 32, zeros=True), GROUPS)
    convert(quantized, tmp_path / "out")
    convert(dense, tmp_path / "expected")
    same(tmp_path / "out", tmp_path / "expected")


def test_a_plan_needs_headers_only(pair, monkeypatch):
    def refuse(*_):
        raise AssertionError("a weight is read")

    monkeypatch.setattr(weights, "read_bytes", refuse)
    dense, quantized = pair
    assert plan_conversion(quantized).totals() == plan_conversion(dense).totals()


@pytest.mark.slow
def test_calibration_and_healing_see_the_dense_weights(source, text, tmp_path):
    dense = tmp_path / "model"
    dense.mkdir()
    for path in source.iterdir():
        (dense / path.name).write_bytes(path.read_bytes())
    quantized = models.save_pair(dense, models.fp8_blocks((16, 16)), BLOCKS)
    config = calibrated(text, samples=4, seqlen=16, heal=2, bits=2)
    convert(quantized, tmp_path / "out", config)
    convert(dense, tmp_path / "expected", config)
    same(tmp_path / "out", tmp_path / "expected")


def test_experts_in_fp8(tmp_path):
    """Each expert has scales of its own; transformers fuses experts while loading."""
    dense = save_tiny("DeepseekV3ForCausalLM", tmp_path / "deepseek")
    quantized = models.save_pair(dense, models.fp8_blocks((16, 16)), BLOCKS)
    convert(quantized, tmp_path / "out")
    convert(dense, tmp_path / "expected")
    same(tmp_path / "out", tmp_path / "expected")


def test_experts_in_mxfp4(tmp_path):
    torch.manual_seed(0)
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
        pad_token_id=0,
        layer_types=["full_attention"],
    )
    GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path / "oss")
    quantized = models.save_mxfp4(tmp_path / "oss")
    report = convert(quantized, tmp_path / "out")
    convert(tmp_path / "oss", tmp_path / "expected")
    same(tmp_path / "out", tmp_path / "expected")
    assert report.document["source_quantization"]["scheme"] == "FP4 in groups of 32"
    sketched = {module["name"] for module in report.modules}
    experts = "model.layers.0.mlp.experts."
    assert {experts + "gate_up_proj", experts + "down_proj"} <= sketched
    assert load_sketched(tmp_path / "out")(torch.arange(8)[None]).logits.isfinite().all()
