"""Calibrated conversion: less error than without, healing, resuming, refusals."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.blocks import open_blocks
from helpers.calibration import StopAt, calibrated, contents, divergence, save_text
from helpers.tiny_models import save_tiny_llama
from helpers.training import word_tokenizer
from spallm_convert import (
    CalibrationError,
    OptionError,
    SketchConfig,
    SourceError,
    SpallmError,
    convert,
    load_sketched,
)
from spallm_convert.calibration import backends
from spallm_convert.calibration.blocks.stages import Streams
from spallm_convert.calibration.healing import tuning
from spallm_convert.calibration.sketching import sketch_block
from spallm_convert.calibration.windows import CalibrationText
from spallm_convert.cli import main
from spallm_convert.cli.demo_run import demo_model
from spallm_convert.sketch.plan import make_plan
from spallm_convert.source.gguf import dequantized
from spallm_convert.source.locate import find_here
from spallm_convert.source.tokenizer import load_tokenizer
from spallm_kernels import fit


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model with a tokenizer."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("source") / "model").folder
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("text") / "text.txt", words=20000)


def options(text, **changes):
    given = {"bits": 3, "groups_per_row": 2, "samples": 8, "seqlen": 32}
    return calibrated(text, **given | changes)


def logits_error(source, folder, *, seed=1):
    """Return the relative error of a sketched model's logits, on tokens outside the text."""
    tokens = torch.randint(2, 128, (8, 32), generator=torch.Generator().manual_seed(seed))
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    sketched = load_sketched(folder, dtype=torch.float32)
    with torch.no_grad():
        expected, found = dense(tokens).logits, sketched(tokens).logits
    return ((found - expected).norm() / expected.norm()).item()


def test_calibrated_models_are_nearer_to_the_dense_one(source, text, tmp_path):
    report = convert(source, tmp_path / "calibrated", options(text))
    convert(source, tmp_path / "plain", SketchConfig(effort="fast", bits=3, groups_per_row=2))
    calibrated, plain = (logits_error(source, tmp_path / name) for name in ("calibrated", "plain"))
    assert calibrated < 0.9 * plain
    assert 0 < report.totals["relative_output_error"] < report.totals["relative_error"]
    assert all(module["relative_output_error"] > 0 for module in report.modules)
    card = (tmp_path / "calibrated/README.md").read_text()
    assert "| calibration | text.txt, 8 samples of 32 tokens |" in card
    assert f"outputs on it | {report.totals['relative_output_error']:.4f} |" in card
    assert str(text) not in (tmp_path / "calibrated/conversion.json").read_text()
    assert "| calibration |" not in (tmp_path / "plain/README.md").read_text()


def test_healed_models_are_nearer_still(text, tmp_path, monkeypatch):
    # Make predictions far from uniform, and steps large enough for weights of that size.
    source = save_tiny_llama(
        tmp_path / "source", tie_word_embeddings=True, initializer_range=0.2
    ).folder
    monkeypatch.setattr(tuning, "LEARNING_RATE", 4e-2)
    word_tokenizer().save_pretrained(source)
    convert(source, tmp_path / "calibrated", options(text, bits=2, samples=300))
    config = options(text, bits=2, samples=300, heal=20)
    report = convert(source, tmp_path / "healed", config)
    gained = report.document["healing"]
    assert 0 < gained["kl_after"] < 0.97 * gained["kl_before"]
    card = (tmp_path / "healed/README.md").read_text()
    assert f"20 steps of healing | {gained['kl_before']:.4f}, {gained['kl_after']:.4f} nats" in card
    calibrated, healed = (
        divergence(source, tmp_path / name, text) for name in ("calibrated", "healed")
    )
    assert healed < 0.97 * calibrated
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("calibrated", "healed")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(".weight_table")}


def test_healing_goes_through_blocks_that_are_left_dense(source, text, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "LEARNING_RATE", 0.1)
    ignored = ("model.layers.1.*",)
    convert(source, tmp_path / "calibrated", options(text, ignore=ignored))
    config = options(text, heal=20, ignore=ignored)
    healing = convert(source, tmp_path / "healed", config).document["healing"]
    assert 0 < healing["kl_after"] < healing["kl_before"]
    dense, calibrated, healed = (
        load_file(folder / "model.safetensors")
        for folder in (source, tmp_path / "calibrated", tmp_path / "healed")
    )
    changed = {name for name in healed if not torch.equal(healed[name], calibrated[name])}
    assert changed
    assert all(name.startswith("model.layers.0.") for name in changed)
    untouched = [name for name in dense if name.startswith("model.layers.1.")]
    assert "model.layers.1.mlp.down_proj.weight" in untouched
    assert all(torch.equal(dense[name], healed[name]) for name in untouched)


def test_a_text_too_short_to_heal_on(source, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("word1 " * 50)
    with pytest.raises(SourceError, match="found 1 sample of 32 tokens, healing needs at least 2"):
        convert(source, tmp_path / "out", options(text, samples=1, heal=2))
    assert not (tmp_path / "out").exists()


STEPS_OF_FIT = {
    "compensation": "compensate",
    "least-squares": "least squares",
    "descent": "descend",
}


@pytest.mark.parametrize("without", [None, "correction", *STEPS_OF_FIT])
def test_steps_can_be_left_out(source, text, tmp_path, without, monkeypatch):
    targets, names = [], set()

    def spied(target, *arguments, **how):
        fitted = fit(target, *arguments, **how)
        targets.append(target.copy())  # it shares its memory with the layer
        names.update(name for name, _ in fitted.losses)
        return fitted

    monkeypatch.setattr(backends, "fit", spied)
    convert(source, tmp_path / "out", options(text, without=(without,) if without else ()))
    assert names == {"k-means", *STEPS_OF_FIT.values()} - {STEPS_OF_FIT.get(without)}
    last = load_file(source / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].float()
    assert np.array_equal(targets[-1], last.numpy()) == (without == "correction")


def test_same_bytes_every_time_and_no_global_state_is_touched(source, text, tmp_path):
    def states():
        return (
            torch.random.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),
            (random.getstate()),
        )

    before = states()
    convert(source, tmp_path / "first", options(text))
    assert states() == before
    torch.manual_seed(5)
    convert(source, tmp_path / "second", options(text))
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    convert(source, tmp_path / "other", options(text, seed=1))
    weights = "model.safetensors"
    assert contents(tmp_path / "first")[weights] != contents(tmp_path / "other")[weights]


@pytest.mark.parametrize("count", [3, 9, 14])
def test_stopped_and_resumed_it_ends_in_the_same_bytes(source, text, tmp_path, count):
    convert(source, tmp_path / "whole", options(text))
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", options(text), progress=StopAt(count))
    kept = list((tmp_path / "out").rglob("block-*.safetensors"))
    assert len(kept) == (count > 7)
    progress = StopAt()
    resume = bool(kept)
    convert(source, tmp_path / "out", options(text), resume=resume, progress=progress)
    assert progress.weights == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_text_that_changed_is_not_gone_on_with(source, text, tmp_path):
    copy = Path(shutil.copy(text, tmp_path / "text.txt"))
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", options(copy), progress=StopAt(9))
    kept = contents(tmp_path / "out")
    assert any(name.startswith("block-") for name in kept)
    before = copy.read_text()
    copy.write_text(before.replace("word1 ", "word2 "))
    with pytest.raises(SpallmError, match="other calibration_tokens"):
        convert(source, tmp_path / "out", options(copy), resume=True)
    assert contents(tmp_path / "out") == kept
    copy.write_text(before)
    convert(source, tmp_path / "out", options(copy), resume=True)


def refused(error, message, *arguments, **changes):
    with pytest.raises(error, match=message):
        convert(*arguments, **changes)
    assert not Path(arguments[1]).exists()


def test_texts_that_cannot_be_used(source, text, tmp_path):
    output = tmp_path / "out"
    refused(
        SourceError, "too short: it has 20,000 tokens", source, output, options(text, samples=999)
    )
    refused(
        OptionError,
        "seqlen 3000 is more than the 2048",
        source,
        output,
        options(text, samples=1, seqlen=3000),
    )
    refused(SourceError, "no such file", source, output, options(tmp_path / "missing.txt"))


def test_models_of_images_are_refused_unless_falling_back_is_allowed(text, tmp_path, capsys):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    word_tokenizer().save_pretrained(tmp_path / "vit")
    output = tmp_path / "out"
    refused(
        CalibrationError,
        "ViTModel reads pixel_values, and calibration needs a model that reads text; --fallback",
        tmp_path / "vit",
        output,
        options(text),
    )
    progress = StopAt()
    allowed = options(text, fallback=True)
    report = convert(tmp_path / "vit", output, allowed, progress=progress)
    assert "relative_output_error" not in report.totals
    needed = "ViTModel reads pixel_values, and calibration needs a model that reads text"
    assert report.document["not_calibrated"] == needed
    assert progress.said == [f"not calibrated: {needed}"]
    assert f"| calibration | none: {needed} |" in (output / "README.md").read_text()
    with pytest.raises(SystemExit):
        main(["inspect", str(output)])
    assert f"not calibrated: {needed}" in capsys.readouterr().out
    convert(
        tmp_path / "vit", tmp_path / "plain", SketchConfig(effort="fast", bits=3, groups_per_row=2)
    )
    weights = "model.safetensors"
    assert contents(output)[weights] == contents(tmp_path / "plain")[weights]


def test_healing_and_bits_by_layer_need_predictions(source, text, tmp_path):
    """Check that the error comes before any work that would be lost."""
    headless = Path(shutil.copytree(source, tmp_path / "headless"))
    config = json.loads((headless / "config.json").read_text())
    config["architectures"] = ["LlamaModel"]
    (headless / "config.json").write_text(json.dumps(config))
    incomplete = Path(shutil.copytree(source, tmp_path / "incomplete"))
    tensors = load_file(incomplete / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, incomplete / "model.safetensors", metadata={"format": "pt"})
    allocated = {"bits": 4, "groups_per_row": "auto", "target_bits": 3.75}
    for model, kind, message in (
        (headless, CalibrationError, "LlamaModel has no output layer"),
        (incomplete, SourceError, "no tensor for lm_head.weight, expected by LlamaForCausalLM"),
    ):
        for changes in ({"heal": 2}, allocated):
            progress, output = StopAt(), tmp_path / "out"
            refused(kind, message, model, output, options(text, **changes), progress=progress)
            assert not progress.done
            assert not progress.said
    convert(headless, tmp_path / "calibrated", options(text))


def test_activations_that_are_no_numbers_are_named(source, text, tmp_path):
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = torch.inf
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.self_attn\.q_proj: its inputs"):
        convert(broken, tmp_path / "out", options(text))


def test_the_command_line_calibrates(source, text, tmp_path, capsys):
    arguments = [str(source), "-o", str(tmp_path / "out"), "--groups-per-row", "2", "--json"]
    arguments += ["--calibration", str(text), "--samples", "4", "--seqlen", "16"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--without", "descent"])
    assert stopped.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["options"]["without"] == ["descent"]
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "output error" in shown
    assert all(module["name"] in shown for module in document["modules"])
    assert "their outputs on the calibration text: 0." in shown
    assert document["totals"]["relative_output_error"] > 0
    with pytest.raises(SystemExit) as stopped:
        main(
            [str(source), "-o", str(tmp_path / "other"), "--without", "descent", "--effort", "fast"]
        )
    assert stopped.value.code == 2
    assert "--effort fast reads no text, so --without cannot be used" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # GGUF reading is transformers' and gguf's own
@pytest.mark.parametrize("bits", [4, 2])
def test_no_step_raises_the_loss_of_a_real_layer(bits, smollm2, tmp_path, monkeypatch):
    checkpoint = find_here(str(smollm2)).open(smollm2)
    tokenizer = load_tokenizer(find_here(str(smollm2)))
    tokens = CalibrationText(tokenizer, "builtin").draw(samples=8, seqlen=128, seed=0)
    blocks = open_blocks(smollm2, tokens, batch=8)
    plan = make_plan(checkpoint, SketchConfig(effort="fast", bits=bits, groups_per_row=1))
    targets = blocks.targets(0, plan.layers.values())
    steps = []
    monkeypatch.setattr(backends, "fit", lambda *a, **k: steps.append(fit(*a, **k)) or steps[-1])
    streams = Streams(list(blocks.inputs), list(blocks.inputs))
    made = sketch_block(blocks, 0, targets, streams, plan.metadata)
    found = [sketched.layer.path for sketched in made]
    assert found[:3] == [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert len(steps) == 7
    for fitted in steps:
        names, losses = zip(*fitted.losses, strict=True)
        assert {"k-means", "compensate", "least squares", "descend"} <= set(names)
        assert list(losses) == sorted(losses, reverse=True)
        assert losses[-1] < 0.8 * losses[0]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    return dequantized(demo_model(), tmp_path_factory.mktemp("smollm2"))
