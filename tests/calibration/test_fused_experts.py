"""Experts whose weights the model holds in one parameter, stored apart or fused."""

import pytest
import torch

from helpers.blocks import open_blocks
from helpers.calibrated_models import output_error, save_model
from helpers.calibration import StopAt, calibrated, contents, save_text
from spallm_convert import SketchConfig, convert
from spallm_convert.calibration import experts
from spallm_convert.calibration.experts import sum_expert_inputs
from spallm_convert.calibration.healing import tuning
from spallm_convert.sketch.plan import make_plan
from spallm_convert.source.locate import find_here

MIXTRAL = "MixtralForCausalLM"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("text") / "text.txt", words=5000)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return save_model(MIXTRAL, tmp_path_factory.mktemp("mixtral") / "model")


def options(text, **changes):
    return calibrated(
        text, **{"bits": 2, "groups_per_row": 1, "samples": 8, "seqlen": 32} | changes
    )


def test_calibrated_experts_are_nearer_and_resumed_alike(mixtral, text, tmp_path):
    config = options(text, samples=16)
    report = convert(mixtral, tmp_path / "calibrated", config)
    convert(mixtral, tmp_path / "plain", SketchConfig(effort="fast", bits=2, groups_per_row=1))
    tokens = torch.randint(2, 128, (8, 32), generator=torch.Generator().manual_seed(1))
    errors = [
        output_error(MIXTRAL, mixtral, tmp_path / name, tokens) for name in ("calibrated", "plain")
    ]
    assert errors[0] < 0.95 * errors[1]
    of_experts = [m for m in report.modules if ".experts." in m["name"]]
    assert len(of_experts) == 24
    assert all(0 < m["relative_output_error"] < m["relative_error"] for m in of_experts)

    with pytest.raises(KeyboardInterrupt):
        convert(mixtral, tmp_path / "out", config, progress=StopAt(20))
    assert len(list((tmp_path / "out").rglob("block-*.safetensors"))) == 1
    convert(mixtral, tmp_path / "out", config, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "calibrated")


def test_experts_that_no_token_reaches_are_counted_and_sketched(text, tmp_path):
    source = save_model("Qwen3MoeForCausalLM", tmp_path / "model")
    progress = StopAt()
    config = options(text, samples=1, seqlen=4)
    report = convert(source, tmp_path / "out", config, progress=progress)
    note = "16 of 16 experts saw fewer tokens of the text than their weights have columns"
    assert report.document["experts"] == note
    assert note in progress.said
    unreached = [m for m in report.modules if m["relative_output_error"] == 0]
    assert len(unreached) >= 3 * (16 - 2 * 4)
    assert all(0 < m["relative_error"] < 0.5 for m in unreached)


@pytest.mark.parametrize("mapping", ["cluster", "hash"])
def test_fused_and_transposed_experts(mapping, text, tmp_path):
    source = save_model("GptOssForCausalLM", tmp_path / "model")
    report = convert(source, tmp_path / "out", options(text, mapping=mapping))
    for module in report.modules:
        assert 0 < module["relative_output_error"] < module["relative_error"]
    tokens = torch.randint(2, 128, (2, 32), generator=torch.Generator().manual_seed(1))
    assert output_error("GptOssForCausalLM", source, tmp_path / "out", tokens) < 1


def mixtral_sums(folder, text_of_block=4):
    """Return the sums over the inputs of both weights of the first block's experts."""
    plan = make_plan(
        find_here(str(folder)).open(folder), SketchConfig(effort="fast", groups_per_row=1)
    )
    tokens = torch.randint(2, 128, (text_of_block, 8), generator=torch.Generator().manual_seed(0))
    blocks = open_blocks(folder, tokens)
    block = blocks.load(0)
    targets = blocks.targets(0, plan.layers.values())
    found = {}
    with torch.no_grad():
        for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
            sums = sum_expert_inputs(blocks, 0, block, targets[name], targets, blocks.inputs)
            found[name] = list(sums)
    return found


def test_sums_do_not_depend_on_how_many_are_in_memory(mixtral, monkeypatch):
    whole = mixtral_sums(mixtral)
    monkeypatch.setattr(experts, "_SUM_BYTES", 0)
    for name, sums in mixtral_sums(mixtral).items():
        assert [found.tokens for found in sums] == [found.tokens for found in whole[name]]
        for found, expected in zip(sums, whole[name], strict=True):
            torch.testing.assert_close(found.hessian, expected.hessian)
            torch.testing.assert_close(found.shrunk, expected.shrunk)


def test_few_tokens_count_less_than_the_mean(mixtral):
    for sums in mixtral_sums(mixtral).values():
        tokens = sum(found.tokens for found in sums)
        assert tokens == 2 * 4 * 8
        mean = sum(found.hessian for found in sums) / tokens
        columns = len(mean)
        for found in sums:
            expected = (found.hessian + columns * mean) / (found.tokens + columns)
            torch.testing.assert_close(found.shrunk, expected)


@pytest.mark.slow
def test_bits_are_chosen_for_whole_parameters(mixtral, text, tmp_path):
    config = calibrated(text, target_bits=7, samples=8, seqlen=16)
    report = convert(mixtral, tmp_path / "out", config)
    for block in range(2):
        for names in (("w1", "w3"), ("w2",)):
            start = f"model.layers.{block}.block_sparse_moe.experts."
            chosen = {
                (module["bits"], module["groups_per_row"])
                for module in report.modules
                if module["name"].startswith(start) and module["name"].endswith(names)
            }
            assert len(chosen) == 1
    assert report.totals["bits_per_weight"] <= 7


@pytest.mark.slow
def test_tables_of_experts_are_healed(mixtral, text, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "LEARNING_RATE", 0.1)
    config = options(text, heal=4, samples=16, seqlen=16, table_dtype="float32")
    healing = convert(mixtral, tmp_path / "out", config).document["healing"]
    assert 0 < healing["kl_after"] < healing["kl_before"]
