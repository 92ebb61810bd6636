"""Conversions that sketch the embedding and the head: plan, identity, patterns, calibration."""

from dataclasses import replace

import pytest
from safetensors.torch import load_file

from helpers.calibration import StopAt
from helpers.remarks import Remarks
from helpers.tiny_models import save_tiny_llama
from spallm_convert import CalibrationConfig, OptionError, SketchConfig, convert, plan_conversion
from spallm_convert.conversion.identity import identity

ENDS = frozenset({"model.embed_tokens", "lm_head"})


def modules(plan):
    return set(plan.metadata.modules)


def test_the_plan_has_what_is_asked_for_and_nothing_else_changes(tiny_llama):
    plain = plan_conversion(tiny_llama.folder)
    assert not modules(plain) & ENDS
    for options, more in (
        ({"embeddings": True}, {"model.embed_tokens"}),
        ({"lm_head": True}, {"lm_head"}),
        ({"embeddings": True, "lm_head": True}, ENDS),
    ):
        plan = plan_conversion(tiny_llama.folder, SketchConfig(effort="fast", **options))
        assert modules(plan) - modules(plain) == more
        assert plan.notes == ()
        shape = plan.metadata.modules[next(iter(more))]
        assert (shape.out_features, shape.in_features, shape.bits) == (128, 64, 4)
        assert plan.totals()["ratio"] > plain.totals()["ratio"]


def test_a_sketched_vocabulary_does_not_hide_that_blocks_stay_dense(tiny_llama):
    plain, config = (
        plan_conversion(tiny_llama.folder),
        SketchConfig(effort="fast", embeddings=True, lm_head=True),
    )
    plan = plan_conversion(tiny_llama.folder, config)
    assert plan.sketched_weights > plain.sketched_weights
    dense = {"dense_weights": {"mlp": 10**6}, "dense_reasons": {"mlp": "of a reason"}}
    warning = replace(plan, **dense).dense_warning
    assert warning == replace(plain, **dense).dense_warning
    assert f"of {plain.sketched_weights + 10**6:,} linear weights" in warning


def test_patterns_apply_to_them_too(tiny_llama):
    config = SketchConfig(effort="fast", embeddings=True, lm_head=True, ignore=("lm_head",))
    plan = plan_conversion(tiny_llama.folder, config)
    assert modules(plan) & ENDS == {"model.embed_tokens"}
    assert plan.left_dense["lm_head"] == "ignored by the pattern 'lm_head'"


def test_both_options_are_part_of_the_identity():
    configs = (
        SketchConfig(effort="fast"),
        SketchConfig(effort="fast", embeddings=True),
        SketchConfig(effort="fast", lm_head=True),
    )
    options = [identity(config, {})["options"] for config in configs]
    assert len({(o["embeddings"], o["lm_head"]) for o in options}) == 3


def test_an_interrupted_conversion_goes_on_to_the_same_bytes(tmp_path):
    source = save_tiny_llama(tmp_path / "source", tie_word_embeddings=True).folder
    config = SketchConfig(effort="fast", embeddings=True, max_shard_size="20KB")
    convert(source, tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", config, progress=StopAt(10))
    convert(source, tmp_path / "out", config, resume=True)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_with_calibration_they_are_sketched_from_their_weights_alone(source, text, tmp_path):
    calibration = CalibrationConfig(text=str(text), samples=2, seqlen=8)
    told = Remarks()
    ends = {"embeddings": True, "lm_head": True}
    convert(
        source,
        tmp_path / "calibrated",
        SketchConfig(**ends, calibration=calibration),
        device="cpu",
        progress=told,
    )
    assert any(
        "model.embed_tokens" in line and "from their weights alone" in line for line in told.lines
    )
    convert(source, tmp_path / "alone", SketchConfig(effort="fast", **ends))
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("calibrated", "alone"))
    assert one.keys() == other.keys()
    equal = {name for name in one if one[name].equal(other[name])}
    assert {f"model.embed_tokens.{part}" for part in ("weight", "weight_table")} <= equal
    assert "model.layers.0.mlp.up_proj.weight" not in equal


def test_bits_by_layer_do_not_reach_them(source, text, tmp_path):
    calibration = CalibrationConfig(text=str(text), samples=2, seqlen=8, target_bits=8)
    with pytest.raises(OptionError, match=r"model\.embed_tokens"):
        convert(
            source,
            tmp_path / "out",
            SketchConfig(embeddings=True, calibration=calibration),
            device="cpu",
        )
