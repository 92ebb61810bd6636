"""A conversion that leaves much of a model dense says so once, with numbers and kinds."""

import pytest

from helpers.architectures import save_tiny
from helpers.calibration import StopAt
from spallm_convert import SketchConfig, convert, plan_conversion

CONFIG = {"groups_per_row": 1}


def warnings(progress):
    return [line for line in progress.said if line.startswith("warning: ")]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("LlavaForConditionalGeneration", "language_model.model.layers.*.mlp.down_proj, "),
        ("Qwen2VLForConditionalGeneration", "model.layers.*.mlp.down_proj, "),
        ("Gemma3ForConditionalGeneration", "language_model.model.layers.*.mlp.down_proj, "),
        ("MixtralForCausalLM", "model.layers.*.block_sparse_moe.experts.*.w1, "),
        ("Qwen3MoeForCausalLM", "model.layers.*.mlp.experts.*.down_proj, "),
    ],
)
def test_layers_that_transformers_renames_or_fuses(name, kinds, tmp_path):
    source = save_tiny(name, tmp_path / "source")
    plan = plan_conversion(source, SketchConfig(**CONFIG))
    assert plan.dense_warning is not None
    assert f"stay dense: {kinds}" in plan.dense_warning
    progress = StopAt()
    convert(source, tmp_path / "out", SketchConfig(**CONFIG), progress=progress)
    assert warnings(progress) == [plan.dense_warning]


def test_weights_are_counted_once_and_kinds_are_counted(tmp_path):
    """One block of LLaVA's language model has 2 x (2 x 32 x 32 + 2 x 32 x 16 + 3 x 32 x 48)."""
    source = save_tiny("LlavaForConditionalGeneration", tmp_path)
    plan = plan_conversion(source, SketchConfig(**CONFIG))
    language = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert sum(plan.dense_weights.values()) == language
    share = language / (language + plan.sketched_weights)
    counts = f"{language:,} of {language + plan.sketched_weights:,} linear weights ({share:.1%})"
    assert plan.dense_warning == (
        f"warning: {counts} stay dense: language_model.model.layers.*.mlp.down_proj, "
        f"language_model.model.layers.*.mlp.gate_proj, language_model.model.layers.*.mlp.up_proj, "
        f"and 4 more"
    )


def test_what_the_user_leaves_dense_does_not_count(tmp_path):
    source = save_tiny("LlavaForConditionalGeneration", tmp_path)
    plan = plan_conversion(source, SketchConfig(ignore=("*.language_model.*",), **CONFIG))
    assert plan.dense_warning is None


def test_a_usual_model_gives_no_warning(tiny_llama, tmp_path):
    progress = StopAt()
    convert(tiny_llama.folder, tmp_path / "out", progress=progress)
    assert warnings(progress) == []
    assert (
        plan_conversion(tiny_llama.folder, SketchConfig(ignore=("*.mlp.*",))).dense_warning is None
    )
