"""A conversion that leaves much of a model dense says so once, with numbers, kinds and reasons."""

import pytest

from helpers.calibration import StopAt
from helpers.tiny_models import add_matrices, save_tiny_llama
from spallm_convert import (
    OptionError,
    Recipe,
    SketchConfig,
    SourceError,
    convert,
    plan_conversion,
)
from spallm_convert.sketch.left_dense import dense_warning

NAMES = [f"model.layers.{block}.mlp.adapter.{part}" for block in (0, 1) for part in ("up", "down")]
#: Weights of the layers of `save_tiny_llama`, and of the matrices that are added.
LAYERS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
MATRICES = 4 * 640 * 64
ALL = LAYERS + MATRICES
WARNING = (
    f"warning: {MATRICES:,} of {ALL:,} linear weights ({MATRICES / ALL:.1%}) stay dense: "
    f"model.layers.*.mlp.adapter.down and 1 more (transformers does not load it)"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model whose blocks hold matrices that transformers does not load."""
    return add_matrices(save_tiny_llama(tmp_path_factory.mktemp("matrices")).folder, *NAMES)


def warnings(progress):
    return [line for line in progress.said if line.startswith("warning: ")]


def test_matrices_without_a_layer(source, tmp_path):
    assert plan_conversion(source).dense_warning == WARNING
    progress = StopAt()
    convert(source, tmp_path / "out", progress=progress)
    assert warnings(progress) == [WARNING]


def test_strict_makes_it_an_error_before_any_work(source, tmp_path):
    messages = []
    for run in (plan_conversion, lambda *given: convert(given[0], tmp_path / "out", given[1])):
        with pytest.raises(SourceError) as caught:
            run(source, SketchConfig(effort="fast", strict=True))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert f"{source}: {WARNING.removeprefix('warning: ')}; --strict accepts 5 %" in messages[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [{"ignore": ["*.layers.0.*"]}, {"include": ["*.mlp.*"]}],
)
def test_what_the_user_leaves_dense_does_not_count(tiny_llama, options):
    plan = plan_conversion(tiny_llama.folder, SketchConfig(effort="fast", strict=True, **options))
    assert plan.dense_weights == plan.dense_reasons == {}


@pytest.mark.parametrize(
    "options",
    [
        {"ignore": ["*.adapter.*"]},
        {"include": ["*.mlp.up_proj"]},
        {"recipe": Recipe.parse({"*.adapter.*": {"dense": True}})},
    ],
)
def test_matrices_without_a_layer_can_be_left_dense(source, options):
    plan = plan_conversion(source, SketchConfig(effort="fast", strict=True, **options))
    assert plan.dense_warning is None
    assert NAMES[0] in plan.left_dense


def test_a_recipe_cannot_sketch_matrices_without_a_layer(source):
    with pytest.raises(OptionError, match=r"'\*.adapter.\*': matches no linear layer"):
        plan_conversion(
            source, SketchConfig(effort="fast", recipe=Recipe.parse({"*.adapter.*": {"bits": 2}}))
        )


def test_strict_changes_no_byte(tiny_llama, tmp_path):
    convert(tiny_llama.folder, tmp_path / "out", SketchConfig(effort="fast"))
    report = convert(
        tiny_llama.folder, tmp_path / "out", SketchConfig(effort="fast", strict=True), resume=True
    )
    assert "strict" not in report.document["options"]


def test_a_usual_model_gives_no_warning(tiny_llama, tmp_path):
    progress = StopAt()
    convert(tiny_llama.folder, tmp_path / "out", progress=progress)
    assert warnings(progress) == []


def test_the_warning_is_one_line_of_300_characters():
    kinds = [f"language_model.model.layers.*.mlp.experts.*.projection_{i}" for i in range(40)]
    dense = {kind: 10**9 - i for i, kind in enumerate(kinds)}
    reasons = {kind: f"reason {i // 2} of a usual length" for i, kind in enumerate(kinds)}
    warning = dense_warning(dense, 10**10, reasons)
    assert warning is not None
    assert len(warning) <= 300
    assert f"stay dense: {kinds[0]} and 1 more (reason 0 of a usual length); {kinds[2]}" in warning
    assert warning.endswith("; and 36 more kinds")
