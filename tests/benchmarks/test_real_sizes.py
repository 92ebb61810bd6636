"""Made-up headers are those that transformers saves, and large models can be planned from them."""

import json

import pytest
import transformers

from benchmarks.reach.__main__ import LEAST_RATIO
from benchmarks.reach.headers import hub_shapes, made_up
from benchmarks.reach.models import PUBLISHED, Published
from benchmarks.reach.one_plan import figures
from benchmarks.reach.table import table
from benchmarks.shared.machine import RESULTS, ROOT
from helpers.architectures import save_tiny
from spallm_convert import SketchConfig
from spallm_convert.sketch.plan import make_plan
from spallm_formats import read_header


# Experts that are stored one by one, tied weights, and names that transformers changes.
@pytest.mark.parametrize(
    "name", ["MixtralForCausalLM", "Qwen2ForCausalLM", "LlavaForConditionalGeneration"]
)
def test_headers_are_those_of_a_saved_model(name, tmp_path):
    saved = read_header(save_tiny(name, tmp_path) / "model.safetensors")
    shapes = hub_shapes(name, transformers.AutoConfig.from_pretrained(tmp_path))
    assert shapes == {name: tensor.shape for name, tensor in saved.items()}


def test_blocks_that_predict_further_tokens_are_in_the_header(tmp_path):
    options = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "first_k_dense_replace": 1,
        "vocab_size": 128,
        "num_nextn_predict_layers": 1,
    }
    tiny = Published("tiny", "Glm4MoeForCausalLM", "Glm4MoeConfig", options, more_blocks=1)
    checkpoint = made_up(tiny, tmp_path)
    assert checkpoint.tensors["model.layers.2.eh_proj.weight"].shape == (64, 128)
    assert "model.layers.2.mlp.experts.3.up_proj.weight" in checkpoint.tensors
    plan = make_plan(checkpoint, SketchConfig(effort="fast", groups_per_row=1))
    found = figures(plan)
    assert "model.layers.1.mlp.experts.3.up_proj" in plan.layers
    reason = plan.left_dense["model.layers.2.mlp.experts.3.up_proj.weight"]
    assert reason == "transformers does not load it"
    assert found["dense"]["model.layers.*.mlp.experts.*.up_proj"]["weights"] == 4 * 64 * 64


#: Models with few tensors, so that the test is fast. transformers 5.0 does not know Nemotron.
FEW_TENSORS = ["Mixtral-8x7B", "gpt-oss-120b (bf16)", "Llama-4-Scout", "Nemotron-3-Nano"]


@pytest.mark.parametrize(
    "name", [name for name in FEW_TENSORS if hasattr(transformers, PUBLISHED[name].config)]
)
def test_a_published_model_becomes_much_smaller(name, tmp_path):
    plan = make_plan(made_up(PUBLISHED[name], tmp_path), SketchConfig(effort="fast"))
    assert plan.totals()["ratio"] >= LEAST_RATIO
    assert figures(plan)["linear_share"] > 0.99


def test_the_page_shows_the_table_of_the_results():
    document = json.loads((RESULTS / "real_sizes.json").read_text())
    assert document["models"].keys() == PUBLISHED.keys()
    assert table(document) in (ROOT / "docs/performance.md").read_text()
