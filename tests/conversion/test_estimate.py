"""Estimates of a dry run: the level that will run, and more time for more effort.

Times of this machine are never compared: only the work is.
"""

import json
import shutil
from dataclasses import astuple, replace

import pytest

from helpers.tiny_gguf import save_tiny_gguf
from helpers.tiny_models import save_tiny_llama
from spallm_convert import CalibrationConfig, SketchConfig, plan_conversion
from spallm_convert.cli.main import main
from spallm_convert.cli.printing import about
from spallm_convert.conversion import memory
from spallm_convert.conversion.estimate import Estimate, estimate_conversion
from spallm_convert.conversion.work import count_work
from spallm_convert.effort import EFFORTS

LEVELS = tuple(EFFORTS)


def estimate(folder, **options) -> Estimate:
    config = SketchConfig(**options)
    return estimate_conversion(str(folder), plan_conversion(folder, config), config, device="cpu")


def test_every_level_has_an_estimate(source):
    found = {level: estimate(source, effort=level) for level in LEVELS}
    for level, one in found.items():
        assert (one.asked, one.effort, one.reason, one.device) == (level, level, None, "cpu")
        assert one.seconds > 0
        assert one.threads >= 1
    memories = [found[level].memory_bytes for level in LEVELS]
    assert memories == sorted(set(memories))


def test_more_effort_is_more_work(source):
    plan = plan_conversion(source)
    texts = {level: SketchConfig(effort=level).text_options for level in LEVELS}
    work = {level: count_work(plan, level, texts[level]) for level in LEVELS}
    assert work["fast"].clustered == work["normal"].clustered == plan.sketched_weights
    assert work["fast"].products == 0 < work["normal"].products < work["high"].products
    assert work["normal"].fitted == 0 < work["high"].fitted
    assert work["high"].fast_products == 0 < work["best"].fast_products
    assert replace(work["best"], fast_products=0) == work["high"]


def test_work_grows_with_the_text(source):
    plan = plan_conversion(source)
    few, many = (
        count_work(plan, "high", CalibrationConfig(samples=samples).at(EFFORTS["high"]))
        for samples in (8, 16)
    )
    assert many.products == 2 * few.products
    assert astuple(replace(many, products=few.products)) == astuple(few)


def test_no_tokenizer_means_fast(source, tmp_path):
    shutil.copytree(source, tmp_path / "model")
    for path in (tmp_path / "model").glob("token*"):
        path.unlink()
    found = estimate(tmp_path / "model")
    assert (found.asked, found.effort) == ("normal", "fast")
    assert "tokenizer cannot be loaded" in found.reason
    assert found.memory_bytes == estimate(source, effort="fast").memory_bytes


def test_a_model_that_reads_no_text_means_fast(tmp_path, source):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = ViTConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path / name)
    found = estimate(tmp_path)
    assert found.effort == "fast"
    assert "ViTForImageClassification reads pixel_values" in found.reason


def test_too_little_memory_means_fast(source, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1)
    assert "needs" in estimate(source).reason
    assert estimate(source, effort="high").effort == "high"  # which does not look


def test_a_gguf_file_takes_the_memory_of_the_dense_model(tmp_path, source):
    """Efforts that take more memory afterwards count as for other sources."""
    tiny = save_tiny_gguf(tmp_path / "tiny.gguf")
    fast, best = (estimate(tiny, effort=effort).memory_bytes for effort in ("fast", "best"))
    totals = plan_conversion(tiny, SketchConfig(effort="fast")).totals()
    assert totals["source_bytes"] == 2 * (totals["sketched_weights"] + totals["kept_weights"])
    largest = 64 * 32  # the embedding
    expected = totals["source_bytes"] + int(3.2 * 4 * largest)
    assert fast - estimate(source, effort="fast").memory_bytes == expected
    assert best > fast


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_experts_that_a_token_uses(tmp_path, chosen):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_local_experts": 4, "num_experts_per_tok": chosen}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads, **experts)).save_pretrained(tmp_path)
    plan = plan_conversion(tmp_path, SketchConfig(ignore=("*self_attn*",)))
    text = SketchConfig(effort="normal").text_options
    tokens = text.samples * text.seqlen
    assert count_work(plan, "normal", text).products == tokens * plan.sketched_weights * chosen / 4


def test_dry_run_prints_the_estimate(capsys, tmp_path):
    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    folder = save_tiny_llama(tmp_path / "model").folder  # without a vocabulary
    reason, line = run(folder, "--dry-run").splitlines()[-2:]
    assert reason.startswith("effort fast in place of normal: ")
    assert line.startswith("effort fast: about ")
    assert line.endswith("GB of memory")
    found = json.loads(run(folder, "--dry-run", "--json"))["estimate"]
    assert (found["asked"], found["effort"]) == ("normal", "fast")
    assert found["reason"] in reason
    assert "effort" not in run(folder, "--dry-run", "-q")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.01, "about 1 second"),
        (31.4, "about 31 seconds"),
        (125, "about 2 minutes"),
        (4000, "about 67 minutes"),
        (9000, "about 2.5 hours"),
        (360_000, "about 100 hours"),
    ],
)
def test_times_in_words(seconds, text):
    assert about(seconds) == text
