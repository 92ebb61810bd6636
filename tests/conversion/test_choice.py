"""Layers, bits and groups that the user chooses by patterns: --include, --ignore, --recipe."""

import pytest

from helpers.architectures import save_tiny
from helpers.calibration import calibrated, contents
from spallm_convert import (
    OptionError,
    Recipe,
    SketchConfig,
    SpallmError,
    convert,
    load_sketched,
    plan_conversion,
    verify,
)
from spallm_convert.sketch.plan import make_plan
from spallm_convert.source.locate import find_here

MIXED = {
    "*.mlp.*": {"bits": 3},
    "*.down_proj": {"bits": 2, "groups": 2},
    "model.layers.0.self_attn.*": {"dense": True},
    "model.layers.0.self_attn.q_proj": {"groups": 4},
}


def planned(folder, **options):
    """Return a plan from the headers of a folder, without a check that transformers loads it."""
    return make_plan(find_here(str(folder)).open(folder), SketchConfig(effort="fast", **options))


def chosen(plan):
    modules = plan.metadata.modules.items()
    return {name.removeprefix("model.layers."): (m.bits, m.groups_per_row) for name, m in modules}


def refusal(folder, **options):
    with pytest.raises(OptionError) as caught:
        planned(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_only_layers_to_include_are_sketched(tiny_llama):
    plan = planned(tiny_llama.folder, include=["*.mlp.*"], ignore=["*.layers.1.*"])
    assert set(chosen(plan)) == {f"0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert plan.left_dense["model.layers.0.self_attn.q_proj"] == "not among the layers to include"
    assert plan.left_dense["model.layers.1.mlp.up_proj"] == "ignored by the pattern '*.layers.1.*'"
    assert plan.dense_warning is None


def test_the_last_entry_that_matches_decides_alone(tiny_llama):
    plan = planned(tiny_llama.folder, bits=4, groups_per_row=1, recipe=Recipe.parse(MIXED))
    found = chosen(plan)
    assert found["1.mlp.up_proj"] == (3, 1)
    assert found["1.mlp.down_proj"] == (2, 2)
    assert found["0.self_attn.q_proj"] == (4, 4)
    assert found["1.self_attn.q_proj"] == (4, 1)
    assert "0.self_attn.k_proj" not in found
    reason = "left dense by the recipe's entry 'model.layers.0.self_attn.*'"
    assert plan.left_dense["model.layers.0.self_attn.k_proj"] == reason
    assert plan.dense_warning is None


def test_ignored_layers_stay_dense_whatever_the_recipe_says(tiny_llama):
    recipe = Recipe.parse({"*.mlp.*": {"bits": 3}})
    assert "0.mlp.up_proj" not in chosen(
        planned(tiny_llama.folder, recipe=recipe, ignore=["*.up_proj"])
    )


@pytest.mark.parametrize("option", ["include", "ignore", "recipe"])
def test_a_pattern_that_matches_nothing_shows_near_names(tiny_llama, option):
    patterns = {"*.donw_proj": {"bits": 3}, "*": {"bits": 4}}
    value = Recipe.parse(patterns) if option == "recipe" else list(patterns)
    message = refusal(tiny_llama.folder, **{option: value})
    assert message.startswith(f"--{option} '*.donw_proj': matches no linear layer of the model's")
    assert message.split("near names are ")[1].startswith("model.layers.*.mlp.down_proj")


def test_names_of_the_model_are_shown_if_none_is_near(tiny_llama):
    message = refusal(tiny_llama.folder, ignore=["*.transformer.ffn"])
    assert "names are model.layers.*.self_attn.q_proj, " in message
    assert message.endswith("and 4 more")


def test_numbers_in_patterns_are_near_too(tiny_llama):
    message = refusal(tiny_llama.folder, ignore=["model.layers.7.mlp.up_proj"])
    assert "near names are model.layers.*.mlp.up_proj" in message


def test_an_entry_that_decides_nothing(tiny_llama):
    recipe = Recipe.parse({"*.down_proj": {"bits": 3}, "*": {"bits": 4}})
    message = refusal(tiny_llama.folder, recipe=recipe)
    assert message.startswith("--recipe '*.down_proj': decides no layer, because later entries")


def test_groups_that_divide_no_columns_are_named(tiny_llama):
    recipe = Recipe.parse({"*.q_proj": {"groups": 3}})
    message = refusal(tiny_llama.folder, groups_per_row=2, recipe=recipe)
    assert message.startswith("groups_per_row 3 does not divide the columns of model.layers.0.self")
    assert "k_proj" not in message


def test_a_target_leaves_only_dense_to_a_recipe(tiny_llama, text):
    recipe = Recipe.parse({"*.up_proj": {"dense": True}})
    source = find_here(str(tiny_llama.folder)).open(tiny_llama.folder)
    plan = make_plan(source, calibrated(text, target_bits=3.5, recipe=recipe))
    assert "0.mlp.up_proj" not in chosen(plan)
    for keys in ({"bits": 3}, {"groups": 1}):
        with pytest.raises(OptionError, match=r"found some in the recipe for '\*.q_proj'"):
            calibrated(text, target_bits=3.5, recipe=Recipe.parse({"*.q_proj": keys}))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return save_tiny("MixtralForCausalLM", tmp_path_factory.mktemp("mixtral"))


EXPERT = "model.layers.0.block_sparse_moe.experts"
PARAMETER = "model.layers.0.mlp.experts.gate_up_proj"


def test_weights_of_one_parameter_must_be_treated_alike(mixtral):
    message = refusal(mixtral, groups_per_row=1, recipe=Recipe.parse({"*.w1": {"bits": 3}}))
    assert message == (
        f"recipe: {EXPERT}.0.w1 and {EXPERT}.0.w3 must be sketched alike, because transformers "
        f"loads both into {PARAMETER}, but 3 bits and groups 1 and 4 bits and groups 1 are given; "
        f"use a pattern that matches both"
    )
    message = refusal(mixtral, recipe=Recipe.parse({"*.experts.2.*": {"dense": True}}))
    assert f"{EXPERT}.0.w1 and {EXPERT}.2.w1 must" in message


@pytest.mark.parametrize("pattern", ["*.w[13]", PARAMETER.replace(".0.", ".*.")])
def test_a_pattern_may_name_the_weights_or_the_parameter(mixtral, pattern):
    recipe = Recipe.parse({pattern: {"bits": 3}})
    found = chosen(planned(mixtral, groups_per_row=1, recipe=recipe))
    assert {name[-2:]: bits for name, (bits, _) in found.items() if ".experts." in name} == {
        "w1": 3,
        "w3": 3,
        "w2": 4,
    }


def test_different_words_for_the_same_are_alike(mixtral):
    recipe = Recipe.parse({"*.w1": {"bits": 3}, "*.w3": {"bits": 3, "groups": 1}})
    assert planned(mixtral, groups_per_row=1, recipe=recipe).layers


@pytest.mark.parametrize("option", ["ignore", "include"])
def test_a_pattern_of_one_weight_counts_for_the_whole_parameter(mixtral, option):
    found = chosen(planned(mixtral, groups_per_row=1, **{option: ["*.experts.0.w1"]}))
    kinds = {name[-2:] for name in found if ".experts." in name}
    assert kinds == ({"w2"} if option == "ignore" else {"w1", "w3"})


def test_a_converted_recipe_is_reported_verified_and_resumed(tiny_llama, tmp_path):
    out = tmp_path / "out"
    config = SketchConfig(effort="fast", groups_per_row=1, recipe=Recipe.parse(MIXED))
    report = convert(tiny_llama.folder, out, config)
    assert verify(out) == []
    assert report.widths == [2, 3, 4]
    assert report.document["options"]["recipe"] == config.recipe.to_json()
    card = (out / "README.md").read_text()
    assert "sketched to 2, 3 and 4 bits" in card
    assert "- 2-bit\n- 3-bit\n- 4-bit\n" in card
    assert "| recipe | `*.mlp.*`: bits 3; `*.down_proj`: bits 2, groups 2; " in card
    assert "`model.layers.0.self_attn.*`: dense true; " in card
    layer = load_sketched(out).model.layers[1].mlp.down_proj
    assert (layer.bits, layer.groups_per_row) == (2, 2)
    before = contents(out)
    convert(tiny_llama.folder, out, config, resume=True)
    assert contents(out) == before
    # The order of entries counts.
    other = Recipe(tuple(reversed(config.recipe.rules[:2])) + config.recipe.rules[2:])
    with pytest.raises(SpallmError, match="decides no layer"):
        convert(
            tiny_llama.folder,
            out,
            SketchConfig(effort="fast", groups_per_row=1, recipe=other),
            resume=True,
        )
    with pytest.raises(SpallmError, match="not empty"):
        convert(tiny_llama.folder, out, SketchConfig(effort="fast", groups_per_row=1), resume=True)


@pytest.mark.slow
def test_mixed_widths_are_calibrated_and_healed(source, text, tmp_path):
    recipe = Recipe.parse({"*.mlp.*": {"bits": 2, "groups": 2}, "*.v_proj": {"dense": True}})
    config = calibrated(text, recipe=recipe, samples=4, seqlen=16, heal=2, groups_per_row=1)
    report = convert(source, tmp_path / "out", config)
    assert report.widths == [2, 4]
    assert "healing" in report.document
    assert "v_proj" not in str(report.modules)
    assert verify(tmp_path / "out") == []


def test_a_plan_of_the_whole_command_obeys(tiny_llama):
    config = SketchConfig(
        effort="fast", include=["*.up_proj"], recipe=Recipe.parse({"*": {"bits": 2}})
    )
    plan = plan_conversion(tiny_llama.folder, config)
    assert set(chosen(plan)) == {"0.mlp.up_proj", "1.mlp.up_proj"}
    assert {bits for bits, _ in chosen(plan).values()} == {2}
