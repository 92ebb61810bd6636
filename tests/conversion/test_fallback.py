"""The effort normal does what fast does if a model cannot be run, and says why."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from helpers.calibrated_models import save_model
from helpers.calibration import StopAt, calibrated, contents
from helpers.training import word_tokenizer
from spallm_convert import (
    CalibrationConfig,
    CalibrationError,
    SketchConfig,
    SourceError,
    SpallmError,
    convert,
)
from spallm_convert.conversion import memory

NO_TOKENIZER = "its tokenizer cannot be loaded (no tokenizer files in its folder)"


def options(text="builtin", **changes):
    given = {"bits": 2, "groups_per_row": 1, "samples": 4, "seqlen": 16}
    return calibrated(text, effort="normal", **given | changes)


def assert_falls_back(source, folder, config, reason, said=None):
    """Check the remark, the report, the card, and that the weights are those of fast.

    said: The reason in the remark, if it is not the one in the report.
    """
    progress = StopAt()
    report = convert(source, folder / "out", config, device="cpu", progress=progress)
    assert reason in report.document["not_calibrated"]
    why = report.document["not_calibrated"]
    assert progress.said[-1] == f"effort fast in place of normal: {said or why}"
    assert progress.weights == 0
    assert "relative_output_error" not in report.totals
    assert report.document["options"]["effort"] == "normal"
    assert json.loads((folder / "out/conversion.json").read_text())["not_calibrated"] == why
    card = (folder / "out/README.md").read_text()
    assert why in card
    assert "| effort | fast in place of normal |" in card
    convert(source, folder / "fast", SketchConfig(effort="fast", bits=2, groups_per_row=1))
    found, expected = contents(folder / "out"), contents(folder / "fast")
    assert found.keys() == expected.keys()
    documents = {"conversion.json", "README.md"}
    assert all(found[name] == expected[name] for name in found.keys() - documents)
    return report


def save_vit(folder):
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    ViTModel(
        ViTConfig(**sizes, num_attention_heads=4, image_size=16, patch_size=8)
    ).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def test_no_tokenizer(tiny_llama, tmp_path):
    reason = f"{tiny_llama.folder.name}: {NO_TOKENIZER}"
    report = assert_falls_back(tiny_llama.folder, tmp_path, options(), reason)
    # The report may be published.
    assert str(tiny_llama.folder) not in (tmp_path / "out/conversion.json").read_text()
    assert "calibration_tokens" not in report.document


def test_no_tokenizer_with_all_defaults(tiny_llama, tmp_path):
    report = convert(tiny_llama.folder, tmp_path / "out")
    assert NO_TOKENIZER in report.document["not_calibrated"]


def test_a_report_never_names_the_folder_of_a_model(tiny_llama, tmp_path):
    source = shutil.copytree(tiny_llama.folder, tmp_path / os.fsdecode(b"caf\xe9"))
    report = convert(source, tmp_path / "out")
    assert "(no tokenizer files in its folder)" in report.document["not_calibrated"]


def test_a_model_of_images(text, tmp_path):
    source = save_vit(tmp_path / "vit")
    assert_falls_back(source, tmp_path, options(text), "ViTModel reads pixel_values")


def test_a_model_whose_blocks_cannot_be_run_one_by_one(text, tmp_path):
    source = save_model("Gemma3nForCausalLM", tmp_path / "model")
    assert_falls_back(source, tmp_path, options(text), "use keys and values of earlier blocks")


def test_inputs_that_are_not_finite(source, text, tmp_path):
    broken = shutil.copytree(source, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    reason = "model.layers.1.self_attn.q_proj: its inputs on the calibration text are not all"
    assert_falls_back(broken, tmp_path, options(text), reason)


def test_a_block_that_does_not_fit_into_memory(source, text, tmp_path, monkeypatch):
    needs = "running the model block by block needs 47.1 KB of memory"
    reports = []
    for number, (free, shown) in enumerate([(1000, "1.0 KB"), (999, "999 bytes")]):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        (tmp_path / f"{number}").mkdir()
        reason, said = f"{needs}, more than was free on cpu", f"{needs}, found {shown} free on cpu"
        assert_falls_back(source, tmp_path / f"{number}", options(text), reason, said)
        reports.append(contents(tmp_path / f"{number}/out"))
    assert reports[0] == reports[1]  # down to the last byte, in spite of another free memory


def test_memory_that_runs_out_later(source, text, tmp_path, monkeypatch):
    reports = []
    for number, size in enumerate([1 << 50, 1 << 51]):

        def fail(*arguments, size=size, **how):
            torch.empty(size)

        monkeypatch.setattr(LlamaDecoderLayer, "forward", fail)
        out, progress = tmp_path / f"{number}", StopAt()
        convert(source, out, options(text), device="cpu", progress=progress)
        assert progress.said[-1].startswith("effort fast in place of normal: device cpu: ")
        assert str(4 * size) in progress.said[-1]  # what torch says
        reports.append(contents(out))
    assert reports[0] == reports[1]
    reason = json.loads(reports[0]["conversion.json"])["not_calibrated"]
    assert reason == "the memory of cpu does not suffice"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 KB"),
        (47_104, "47.1 KB"),
        (2_500_000, "2.5 MB"),
        (61_000_000_000, "61.0 GB"),
        (3 * 10**12, "3.0 TB"),
    ],
)
def test_sizes_in_words(count, text):
    assert memory.size_in_words(count) == text


def test_memory_counts_the_largest_block_and_the_largest_other_weight(
    source, text, tmp_path, monkeypatch
):
    attention, mlp = 32 * (32 + 32 + 16 + 16), 3 * 32 * 48
    embedding = 128 * 32
    needed = 4 * (attention + mlp + embedding)
    for free, fits in ((None, True), (needed, True), (needed - 1, False)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        report = convert(source, tmp_path / f"out-{free}", options(text), device="cpu")
        assert ("not_calibrated" not in report.document) == fits


def test_resumed_with_more_memory_it_is_as_if_there_always_had_been(
    source, text, tmp_path, monkeypatch
):
    """Shards that were sketched from the weights alone are written again."""
    config = options(text, max_shard_size="4KB")
    convert(source, tmp_path / "whole", config, device="cpu")
    with monkeypatch.context() as patched:
        patched.setattr(memory, "free_memory", lambda device: 1000)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", config, device="cpu", progress=StopAt(10))
    records = (json.loads(path.read_text()) for path in (tmp_path / "out").rglob("*.record.json"))
    sums = [found for record in records for found in record["modules"].values()]
    assert {len(found) for found in sums} == {2}
    convert(source, tmp_path / "out", config, device="cpu", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_text_that_the_user_names_must_be_there(source, tiny_llama, tmp_path):
    missing = tmp_path / "missing.txt"
    with pytest.raises(SourceError, match="no such file"):
        convert(source, tmp_path / "out", options(missing))
    missing.write_text("word1 " * 100)
    with pytest.raises(SourceError, match="tokenizer cannot be loaded"):
        convert(tiny_llama.folder, tmp_path / "out", options(missing))
    assert not (tmp_path / "out").exists()


def test_without_fallback_each_reason_is_an_error(source, tiny_llama, text, tmp_path, monkeypatch):
    with pytest.raises(SourceError, match="tokenizer cannot be loaded"):
        convert(tiny_llama.folder, tmp_path / "out", options(fallback=False))
    vit = save_vit(tmp_path / "vit")
    with pytest.raises(CalibrationError, match="ViTModel reads pixel_values"):
        convert(vit, tmp_path / "out", options(text, fallback=False))
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    with pytest.raises(SpallmError, match=r"needs 47\.1 KB of memory, found 1\.0 KB free"):
        convert(source, tmp_path / "out", options(text, fallback=False))
    assert not (tmp_path / "out/config.json").exists()


def test_the_effort_high_asks_for_a_tokenizer(tiny_llama, tmp_path):
    config = SketchConfig(effort="high", calibration=CalibrationConfig(samples=4, seqlen=16))
    with pytest.raises(SourceError, match="tokenizer cannot be loaded"):
        convert(tiny_llama.folder, tmp_path / "out", config)
