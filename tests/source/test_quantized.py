"""Quantized sources: each form is decoded to its dense weight; what is not read is refused."""

import json
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from helpers import quantized_models as models
from spallm_convert.errors import SourceError
from spallm_convert.source.checkpoint import checked_shards, open_dense
from spallm_convert.source.reading import read_columns, read_matrix, read_rows, read_stored
from spallm_formats import CONFIG_FILE, from_float32

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 24]}
MXFP4 = {"quant_method": "mxfp4"}
INT4 = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
FLOAT8 = {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}


def compressed(**more):
    """A description as compressed-tensors writes it."""
    groups = {"config_groups": {"group_0": INT4 | {"targets": ["Linear"]}, "group_1": FLOAT8}}
    return (
        {"quant_method": "compressed-tensors", "quantization_status": "compressed"} | groups | more
    )


@pytest.fixture
def opened(tmp_path):
    """A function that saves tensors with a config, and opens them as a source."""

    def save(tensors, description, **config):
        document = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"} | config
        if description is not None:
            document["quantization_config"] = description
        (tmp_path / CONFIG_FILE).write_text(json.dumps(document))
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return open_dense(tmp_path, checked_shards(tmp_path))

    return save


FORMS = {
    "ragged blocks of FP8": (models.fp8_blocks((16, 24)), FP8),
    "blocks of FP8 as large as the weight": (models.fp8_blocks((64, 128)), FP8),
    "FP8 with a scale per tensor": (
        models.fp8_tensor,
        {"quant_method": "fp8", "weight_block_size": None},
    ),
    "FP8 with a scale per row": (models.fp8_rows, compressed(format="float-quantized")),
    "FP8 of fbgemm": (models.fp8_rows, {"quant_method": "fbgemm_fp8"}),
    "int8": (models.int8_rows, compressed(format="int-quantized")),
    "packed int4": (models.packed_groups(4, 32, zeros=False), compressed(format="pack-quantized")),
    "packed int4 with zero points": (models.packed_groups(4, 32, zeros=True), compressed()),
    "NVFP4": (models.nvfp4, compressed(format="nvfp4-pack-quantized")),
}


@pytest.mark.parametrize(("quantize", "description"), FORMS.values(), ids=FORMS)
def test_rows_are_those_of_the_dense_weight(opened, quantize, description):
    torch.manual_seed(0)
    stored, dense = quantize(torch.randn(40, 96) * 0.05)
    parts = {"layer.weight" + end: part for end, part in stored.items()}
    checkpoint = opened(parts | {"norm.weight": torch.ones(3)}, description)
    assert set(checkpoint.tensors) == {"layer.weight", "norm.weight"}
    assert "quantization_config" not in checkpoint.config
    weight = checkpoint.tensors["layer.weight"]
    assert (weight.dtype, weight.shape, weight.nbytes) == ("BF16", (40, 96), 40 * 96 * 2)
    np.testing.assert_array_equal(read_rows(weight, 0, 40), dense.numpy())
    for first, stop in [(0, 1), (15, 17), (33, 40), (7, 7)]:
        np.testing.assert_array_equal(read_rows(weight, first, stop), dense[first:stop].numpy())
    expected = from_float32(dense.numpy(), "BF16").tobytes()
    assert bytes(read_stored(weight, 0, weight.nbytes)) == expected
    assert bytes(read_stored(weight, 101, 1001)) == expected[101:1001]
    np.testing.assert_array_equal(read_rows(checkpoint.tensors["norm.weight"], 0, 1), [[1, 1, 1]])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # transformers 5.0 compiles
def test_blocks_of_fp8_as_transformers_dequantizes_them(opened):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    codes = torch.randn(32, 48).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2) + 0.5
    settings = SimpleNamespace(weight_block_size=FP8["weight_block_size"])
    dequantize = Fp8Dequantize(SimpleNamespace(quantization_config=settings))
    parts = {"weight": [codes], "weight$": [codes], "weight_scale_inv": [scales]}  # 5.0 has "$"
    expected = dequantize.convert(parts, full_layer_name="a.weight")["a.weight"]
    checkpoint = opened({"a.weight": codes, "a.weight_scale_inv": scales}, FP8)
    found = read_rows(checkpoint.tensors["a.weight"], 0, 32)
    np.testing.assert_array_equal(found, expected.float().numpy())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_experts_of_deepseek_v4(opened, dtype):
    """FP4 in I8, scales that are powers of two, under the name `scale`."""
    torch.manual_seed(0)
    codes = torch.randint(-128, 128, (24, 32), dtype=torch.int8)
    scales = torch.randint(110, 130, (24, 2), dtype=torch.uint8)
    pairs = torch.stack([codes.view(torch.uint8) & 15, codes.view(torch.uint8) >> 4], -1)
    values = models.FP4[pairs.flatten(1).long()]
    expected = values * models.spread(2.0 ** (scales.float() - 127), (24, 64), (1, 32))
    stored = {"e.weight": codes, "e.scale": scales.view(dtype)}
    weight = opened(stored, FP8 | {"expert_dtype": "fp4"}).tensors["e.weight"]
    assert weight.shape == (24, 64)
    np.testing.assert_array_equal(read_rows(weight, 0, 24), expected.numpy())


def test_stacked_experts_have_blocks_of_their_own(opened):
    torch.manual_seed(0)
    codes = torch.randn(3, 20, 30).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, 2) + 0.5
    stored = {"experts.up_proj": codes, "experts.up_proj_scale_inv": scales}
    weight = opened(stored, FP8).tensors["experts.up_proj"]
    dense = (codes.float() * models.spread(scales, codes.shape, (16, 24))).numpy()
    np.testing.assert_array_equal(read_rows(weight, 0, 60), dense.reshape(60, 30))
    np.testing.assert_array_equal(read_rows(weight, 18, 23), dense.reshape(60, 30)[18:23])
    np.testing.assert_array_equal(read_matrix(weight, 1), dense[1])
    np.testing.assert_array_equal(read_columns(weight, 2, 5, 9), dense[2, :, 5:9].T)


def test_experts_of_gpt_oss_as_transformers_dequantizes_them(opened):
    torch.manual_seed(0)
    blocks, scales = models.mxfp4(3, 20, 64)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    bias = torch.zeros(3, 20)
    stored = {name + "_blocks": blocks, name + "_scales": scales, name + "_bias": bias}
    checkpoint = opened(stored, MXFP4)
    assert set(checkpoint.tensors) == {name, name + "_bias"}
    weight = checkpoint.tensors[name]
    dense = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()
    assert weight.shape == dense.shape == (3, 64, 20)
    np.testing.assert_array_equal(read_matrix(weight, 2), dense[2])
    np.testing.assert_array_equal(read_columns(weight, 1, 4, 9), dense[1, :, 4:9].T)
    matrix = dense.reshape(192, 20)
    np.testing.assert_array_equal(read_rows(weight, 0, 192), matrix)
    np.testing.assert_array_equal(read_rows(weight, 60, 131), matrix[60:131])
    rounded = from_float32(matrix, "BF16").tobytes()
    assert bytes(read_stored(weight, 3, weight.nbytes)) == rounded[3:]


def test_plain_tensors_are_read_in_the_same_way(opened):
    dense = torch.randn(3, 4, 5, dtype=torch.float16)
    weight = opened({"experts": dense}, None).tensors["experts"]
    np.testing.assert_array_equal(read_rows(weight, 3, 7), dense.float().reshape(12, 5)[3:7])
    np.testing.assert_array_equal(read_matrix(weight, 1), dense[1].float())
    np.testing.assert_array_equal(read_columns(weight, 1, 2, 4), dense[1, :, 2:4].T.float())
    assert bytes(read_stored(weight, 5, 9)) == dense.numpy().tobytes()[5:9]


def test_columns_may_be_sorted_before_they_are_grouped(opened):
    torch.manual_seed(0)
    quantize = models.packed_groups(4, 32, zeros=False)
    stored, dense = quantize(torch.randn(8, 96) * 0.05)
    order = torch.randperm(96)
    codes = dense / models.spread(stored["_scale"].float(), dense.shape, (1, 32))
    parts = stored | {
        "_packed": models.packed_words(codes[:, order], 4),
        "_g_idx": (order // 32).to(torch.int32),
    }
    checkpoint = opened({"a.weight" + end: part for end, part in parts.items()}, compressed())
    weight = checkpoint.tensors["a.weight"]
    np.testing.assert_array_equal(read_rows(weight, 0, 8), dense[:, order].numpy())


def test_tensors_that_only_quantized_models_use_are_dropped(opened):
    stored, _ = models.fp8_tensor(torch.randn(8, 8))
    parts = {"layers.0.q_proj.weight" + end: part for end, part in stored.items()}
    extra = [
        "layers.0.q_proj.input_scale",
        "layers.0.q_proj.activation_scale",
        "layers.0.self_attn.k_scale",
        "layers.0.self_attn.v_scale",
        "layers.0.gate.weight_scale_inv",
    ]
    kept = ["layers.0.gate.weight", "layers.0.layer_scale", "q_l2_clip.scale", "logit_scale"]
    parts |= {name: torch.ones(1) for name in extra + kept}
    checkpoint = opened(parts, {"quant_method": "fp8"})
    assert set(checkpoint.tensors) == {"layers.0.q_proj.weight", *kept}
    assert set(checkpoint.quantization.dropped) == set(extra)
    assert checkpoint.quantization.remarks()[1] == (
        "5 tensors that only quantized models use are not copied: activation_scale, input_scale, "
        "k_scale, and 2 more"
    )


def test_the_description_may_stand_in_the_config_of_the_text_model(opened):
    quantize = models.packed_groups(4, 32, zeros=False)
    stored, dense = quantize(torch.randn(8, 64) * 0.05)
    parts = {"a.weight" + end: part for end, part in stored.items()}
    nested = {"quantization_config": compressed(), "dtype": "float32", "hidden_size": 64}
    checkpoint = opened(parts, None, text_config=nested)
    assert checkpoint.config["text_config"] == {"dtype": "float32", "hidden_size": 64}
    np.testing.assert_array_equal(read_rows(checkpoint.tensors["a.weight"], 0, 8), dense.numpy())


def test_files_that_hold_only_scales_are_files_of_the_model(tmp_path):
    stored, _ = models.fp8_tensor(torch.randn(8, 8))
    shards = {"a.weight": stored[""]}, {"a.weight_scale": stored["_scale"]}
    weight_map = {}
    for number, shard in enumerate(shards):
        save_file(shard, tmp_path / f"{number}.safetensors")
        weight_map |= dict.fromkeys(shard, f"{number}.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    document = {"architectures": ["A"], "quantization_config": {"quant_method": "fbgemm_fp8"}}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(document))
    checkpoint = open_dense(tmp_path, checked_shards(tmp_path))
    assert [path.name for path in checkpoint.weight_files] == ["0.safetensors", "1.safetensors"]


def test_only_the_rows_that_are_asked_for_are_in_memory(opened):
    codes = torch.zeros(4096, 1024, dtype=torch.uint8).view(torch.float8_e4m3fn)
    stored = {"a.weight": codes, "a.weight_scale_inv": torch.ones(32, 8)}
    weight = opened(stored, FP8 | {"weight_block_size": [128, 128]}).tensors["a.weight"]
    tracemalloc.start()
    try:
        read_rows(weight, 2000, 2256)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 256 * 1024 * (1 + 4) * 1.2  # codes in one byte, values in four


def fp8(**more):
    stored, _ = models.fp8_blocks((16, 24))(torch.randn(40, 96))
    return {"a.weight" + end: part for end, part in stored.items()} | more


REFUSED = {
    "scales that do not fit": (
        lambda: fp8(**{"a.weight_scale_inv": torch.ones(7, 5)}),
        FP8,
        "'a.weight' [40, 96] does not fit its scales 'a.weight_scale_inv' [7, 5]",
    ),
    "no scales": (
        lambda: fp8(**{"b.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}),
        FP8,
        "'b.weight' is F8_E4M3 and has no scales",
    ),
    "scales of integers": (
        lambda: fp8(**{"a.weight_scale_inv": torch.ones(3, 4, dtype=torch.int32)}),
        FP8,
        "has scales of dtype I32",
    ),
    "nothing is quantized": (
        lambda: {"a.weight": torch.ones(2, 2)},
        FP8,
        "the config says that weights are quantized (fp8), but none are",
    ),
    "blocks without scales": (
        lambda: {"e_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8)},
        MXFP4,
        "does not fit its scales 'e_scales' (none)",
    ),
    "stored twice": (
        lambda: {
            "a.weight": torch.ones(8, 64),
            "a.weight_packed": torch.zeros(8, 8, dtype=torch.int32),
            "a.weight_scale": torch.ones(8, 2),
        },
        compressed(),
        "'a.weight' is stored both dense and quantized",
    ),
    "bits that the config does not name": (
        lambda: {
            "a.weight_packed": torch.zeros(8, 8, dtype=torch.int32),
            "a.weight_scale": torch.ones(8, 3),
        },
        compressed(),
        "has [] bits by its config, expected one of (2, 4, 8)",
    ),
    "zero points that do not fit": (
        lambda: {
            "a.weight": torch.zeros(8, 8, dtype=torch.int8),
            "a.weight_scale": torch.ones(8, 1),
            "a.weight_zero_point": torch.zeros(7, 1, dtype=torch.int8),
        },
        compressed(),
        "does not fit its zero points, I8 [7, 1]",
    ),
}


@pytest.mark.parametrize(("tensors", "description", "message"), REFUSED.values(), ids=REFUSED)
def test_parts_that_do_not_fit_are_refused_from_headers(opened, tensors, description, message):
    torch.manual_seed(0)
    with pytest.raises(SourceError) as error:
        opened(tensors(), description)
    assert message in str(error.value)


def test_an_order_of_columns_beyond_the_groups_is_an_error(opened):
    stored, _ = models.packed_groups(4, 32, zeros=False)(torch.randn(8, 64))
    stored["_g_idx"] = torch.full((64,), 2, dtype=torch.int32)
    weight = opened({"a.weight" + e: p for e, p in stored.items()}, compressed()).tensors[
        "a.weight"
    ]
    with pytest.raises(Exception, match=r"'a\.weight_g_idx' holds 2 to 2, expected 0 to 1"):
        read_rows(weight, 0, 8)


METHODS = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ".dequantize()"),
    "older bitsandbytes": ({"load_in_8bit": True}, ".dequantize()"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "spallm-convert BASE_MODEL"),
    "awq": ({"quant_method": "awq", "bits": 4}, "spallm-convert BASE_MODEL"),
    "torchao": ({"quant_method": "torchao"}, "spallm-convert BASE_MODEL"),
    "no object": ("int4", "already quantized (int4)"),
    "marlin": (compressed(format="marlin-24"), "format 'marlin-24', which is not read"),
    "sparse": (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "'sparse-24-bitmask'"),
    "transforms": (compressed(transform_config={"config_groups": {"u": {}}}), "transforms"),
}


@pytest.mark.parametrize(("description", "message"), METHODS.values(), ids=METHODS)
def test_other_methods_are_refused_in_one_short_line(opened, tmp_path, description, message):
    many = {f"layers.{n}.weight": torch.zeros(2, 2, dtype=torch.uint8) for n in range(100)}
    with pytest.raises(SourceError) as error:
        opened(many, description)
    text = str(error.value).replace(str(tmp_path), "model")
    assert message in text
    assert "already quantized (" in text
    assert len(text) < 300
    assert "\n" not in text
