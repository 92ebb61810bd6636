"""The effort normal: same bytes, interruptions, damaged files, and less error under importance."""

import numpy as np
import pytest
import torch

from helpers.calibrated_models import save_model
from helpers.calibration import StopAt, calibrated, contents
from helpers.decoded import decoded_weights, modules_of, tensors_of
from spallm_convert import SketchConfig, convert
from spallm_convert.calibration import importance
from spallm_convert.calibration.blocks.opening import open_blocks
from spallm_convert.calibration.importance import measure_importance
from spallm_convert.conversion import shards
from spallm_convert.conversion.texts import draw_texts
from spallm_convert.progress import Silent
from spallm_convert.sketch.plan import make_plan
from spallm_convert.source.locate import find_here
from spallm_kernels import kmeans

_MEASURE_BLOCK = importance._measure_block
_WRITE_SHARD = shards.write_shard


def options(text, **changes):
    """Return options of the effort normal for a short text, and small shards."""
    given = {"bits": 2, "groups_per_row": 2, "samples": 8, "seqlen": 32}
    return calibrated(text, **given | {"effort": "normal", "max_shard_size": "4KB"} | changes)


@pytest.fixture
def work(monkeypatch):
    """Return lists of the blocks that are measured, and of the shards that are written."""
    blocks, written = [], []

    def measure(listed, number, *arguments):
        blocks.append(number)
        return _MEASURE_BLOCK(listed, number, *arguments)

    def write(staging, shard, *arguments):
        written.append(shard.filename)
        return _WRITE_SHARD(staging, shard, *arguments)

    monkeypatch.setattr(importance, "_measure_block", measure)
    monkeypatch.setattr("spallm_convert.conversion.job.write_shard", write)
    return blocks, written


@pytest.fixture(scope="module")
def whole(source, text, tmp_path_factory):
    """Return the files of a conversion that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    convert(source, folder, options(text), device="cpu")
    return contents(folder)


def stopped(source, output, config, **when):
    """Stop a conversion; return the names of the files that it kept of what was measured."""
    with pytest.raises(KeyboardInterrupt):
        convert(source, output, config, device="cpu", progress=StopAt(**when))
    kept = [*output.rglob("importance-*"), *output.rglob("states-*")]
    return {path.name.rpartition("-")[0]: path for path in kept}


def test_the_same_bytes_twice_whatever_the_state_of_torch(source, text, tmp_path, whole):
    torch.manual_seed(5)
    convert(source, tmp_path / "out", options(text), device="cpu", threads=1)
    assert contents(tmp_path / "out") == whole
    fast = SketchConfig(effort="fast", bits=2, groups_per_row=2, max_shard_size="4KB")
    convert(source, tmp_path / "fast", fast)
    weights = [name for name in whole if name.endswith(".safetensors")]
    assert len(weights) > 1
    plain = contents(tmp_path / "fast")
    assert all(plain[name] != whole[name] for name in weights if tables_in(plain[name]))


def tables_in(data):
    return b"weight_table" in data


def test_stopped_before_any_block_is_measured(source, text, tmp_path, whole, work):
    assert not stopped(source, tmp_path / "out", options(text), lines=1)
    convert(source, tmp_path / "out", options(text), device="cpu")
    assert work[0] == [0, 1]
    assert contents(tmp_path / "out") == whole


def test_stopped_after_a_block_it_measures_only_the_next(source, text, tmp_path, whole, work):
    kept = stopped(source, tmp_path / "out", options(text), lines=2)
    assert kept.keys() == {"importance-0", "states"}
    assert work == ([0], [])
    work[0].clear()
    progress = StopAt()
    convert(source, tmp_path / "out", options(text), device="cpu", resume=True, progress=progress)
    assert work[0] == [1]
    assert progress.said == ["measuring the inputs of block 2 of 2"]
    assert progress.weights == 0
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("modules", [3, 10])
def test_stopped_among_shards_it_measures_nothing(source, text, tmp_path, whole, work, modules):
    kept = stopped(source, tmp_path / "out", options(text), modules=modules)
    assert kept.keys() == {"importance-0", "importance-1", "states"}
    blocks, written = work
    done = written[:-1]  # in the last one it was stopped
    assert done
    blocks.clear()
    written.clear()
    progress = StopAt()
    convert(source, tmp_path / "out", options(text), device="cpu", resume=True, progress=progress)
    assert blocks == []
    assert written
    assert not {*written} & {*done}
    assert progress.weights == 0
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("damage", ["shorter", "changed", "empty", "gone"])
@pytest.mark.parametrize("name", ["importance-0", "states"])
def test_damaged_files_are_measured_again(source, text, tmp_path, whole, work, name, damage):
    path = stopped(source, tmp_path / "out", options(text), lines=2)[name]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes({"shorter": data[:-9], "changed": data}.get(damage, b""))
    if damage == "gone":
        path.unlink()
    work[0].clear()
    convert(source, tmp_path / "out", options(text), device="cpu", resume=True)
    assert work[0] == [0, 1]
    assert contents(tmp_path / "out") == whole


def test_files_of_a_text_with_another_number_of_batches_are_not_used(
    source, text, tmp_path, work, monkeypatch
):
    """Batches may be of another size in the run that continues."""
    stopped(source, tmp_path / "out", options(text), lines=2)
    work[0].clear()
    monkeypatch.setattr("spallm_convert.calibration.blocks.opening._BATCH_TOKENS", 64)
    convert(source, tmp_path / "out", options(text), device="cpu", resume=True)
    assert work[0] == [0, 1]


def test_a_model_with_two_lists_starts_again(text, tmp_path, work):
    source = save_model("T5ForConditionalGeneration", tmp_path / "model")
    config = options(text, groups_per_row=1)
    convert(source, tmp_path / "whole", config, device="cpu")
    assert work[0] == [0, 1, 0, 1]  # of the encoder, then of the decoder
    assert not stopped(source, tmp_path / "out", config, lines=4)
    convert(source, tmp_path / "out", config, device="cpu")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_blocks_without_sketched_layers_are_passed_through(source, text, tmp_path, work):
    config = options(text, ignore=("model.layers.0.*",))
    kept = stopped(source, tmp_path / "out", config, lines=2)
    assert kept.keys() == {"importance-0", "states"}
    work[0].clear()
    report = convert(source, tmp_path / "out", config, device="cpu", resume=True)
    assert work[0] == [1]
    assert len(report.modules) == 7
    assert all(module["relative_output_error"] > 0 for module in report.modules)


def weighted_sums(source, sketched, found):
    """Return squared errors and squares under importance, by stored tensor, from the files."""
    dense, sums = tensors_of(source), {}
    for name, weight in decoded_weights(sketched).items():
        exact = dense[name].double()
        counts = torch.from_numpy(found[name.removesuffix(".weight")]).double()
        sums[name] = (
            (counts * (exact - weight.double()) ** 2).sum().item(),
            (counts * exact**2).sum().item(),
        )
    return sums


def importance_of(source, config, folder):
    """Measure the importance as a conversion does."""
    folder.mkdir()
    found = find_here(str(source))
    checkpoint = found.open(source)
    plan = make_plan(checkpoint, config)
    tokens = draw_texts(found, config, trust_remote_code=False).calibration
    blocks = open_blocks(checkpoint, plan, tokens)
    return measure_importance(blocks, plan, folder, Silent())


@pytest.mark.parametrize("bits", [2, 3])
def test_errors_under_importance_are_smaller_than_those_of_fast(source, text, tmp_path, bits):
    config = options(text, bits=bits, table_dtype="float32")
    report = convert(source, tmp_path / "normal", config, device="cpu")
    fast = SketchConfig(effort="fast", bits=bits, groups_per_row=2, table_dtype="float32")
    plain = convert(source, tmp_path / "fast", fast)
    found = importance_of(source, config, tmp_path / "kept")
    ours, theirs = (weighted_sums(source, tmp_path / name, found) for name in ("normal", "fast"))
    for module in report.modules:
        name = module["name"] + ".weight"
        error, square = ours[name]
        assert module["relative_output_error"] == pytest.approx((error / square) ** 0.5, rel=1e-6)
        assert error < theirs[name][0]
    error, square = map(sum, zip(*ours.values(), strict=True))
    assert report.totals["relative_output_error"] == pytest.approx((error / square) ** 0.5)
    # What is gained for outputs is paid for in the weights.
    assert report.totals["relative_error"] > plain.totals["relative_error"]
    assert "relative_output_error" not in plain.totals
    assert report.document["device"] == "cpu"
    assert "not_calibrated" not in report.document


@pytest.mark.parametrize("kind", ["GptOssForCausalLM", "MixtralForCausalLM"])
def test_rows_of_experts_use_the_importance_of_their_expert(text, tmp_path, kind, monkeypatch):
    """Sketch few rows at a time, so that a block of rows ends inside an expert or spans several."""
    source = save_model(kind, tmp_path / "model")
    config = options(text, groups_per_row=1, table_dtype="float32")
    monkeypatch.setattr(shards, "BLOCK_WEIGHTS", 40 * 32)
    convert(source, tmp_path / "out", config, device="cpu")
    found = importance_of(source, config, tmp_path / "kept")
    dense, checked = tensors_of(source), set()
    for name, module, tensor, _, table in modules_of(tmp_path / "out"):
        if ".experts." not in name:
            continue
        experts = module.get("experts", 1)
        assert found[name].shape == (experts, module["in_features"])
        weights = dense[tensor].float()
        weights = weights.transpose(1, 2) if module.get("transposed") else weights
        rows = weights.reshape(experts, module["out_features"], -1).numpy()
        tables = table.numpy().reshape(*rows.shape[:2], 1, 4)
        for expert in range(experts):
            expected, _ = kmeans(rows[expert], found[name][expert : expert + 1], 1, 4)
            np.testing.assert_array_equal(tables[expert], expected.astype(np.float32))
        assert experts == 1 or len(np.unique(found[name], axis=0)) == experts
        checked.add(name)
    assert len(checked) == {"GptOssForCausalLM": 4, "MixtralForCausalLM": 24}[kind]
