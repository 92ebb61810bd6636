"""Models of many kinds that read text: encoders, decoders behind encoders, and towers beside."""

import json

import pytest
import torch

from helpers.calibrated_models import output_error, save_model
from helpers.calibration import StopAt, calibrated, contents, save_text
from spallm_convert import CalibrationError, OptionError, SketchConfig, convert


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("text") / "text.txt", words=5000)


def options(text, **changes):
    return calibrated(
        text, **{"bits": 2, "groups_per_row": 1, "samples": 8, "seqlen": 32} | changes
    )


@pytest.mark.parametrize("name", ["BertModel", "T5ForConditionalGeneration"])
def test_calibration_brings_encoders_and_decoders_nearer(name, text, tmp_path):
    source = save_model(name, tmp_path / "model")
    report = convert(source, tmp_path / "calibrated", options(text, samples=32))
    convert(source, tmp_path / "plain", SketchConfig(effort="fast", bits=2, groups_per_row=1))
    tokens = torch.randint(2, 128, (4, 32), generator=torch.Generator().manual_seed(1))
    errors = [output_error(name, source, tmp_path / n, tokens) for n in ("calibrated", "plain")]
    assert errors[0] < errors[1]
    assert all(module["relative_output_error"] > 0 for module in report.modules)
    assert "partly_calibrated" not in report.document


@pytest.mark.parametrize(
    "name", ["BartForConditionalGeneration", "BambaForCausalLM", "MambaForCausalLM"]
)
def test_outputs_suffer_less_than_weights(name, text, tmp_path):
    """Include Bamba, whose blocks return more than hidden states."""
    report = convert(save_model(name, tmp_path / "model"), tmp_path / "out", options(text))
    assert all(module["relative_output_error"] > 0 for module in report.modules)
    assert report.totals["relative_output_error"] < report.totals["relative_error"]


def test_a_decoder_gets_what_its_encoder_found(text, tmp_path):
    """Stop in the decoder; the encoder must be run again for the decoder's arguments."""
    source = save_model("T5ForConditionalGeneration", tmp_path / "model")
    whole = convert(source, tmp_path / "whole", options(text))
    count = sum(module["name"].startswith("encoder.") for module in whole.modules)
    layers = len(whole.modules) - count
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", options(text), progress=StopAt(count + layers // 2 + 1))
    convert(source, tmp_path / "out", options(text), resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_towers_are_sketched_without_the_text(text, tmp_path):
    source = save_model("LlavaForConditionalGeneration", tmp_path / "model")
    progress = StopAt()
    report = convert(source, tmp_path / "out", options(text), progress=progress)
    assert progress.weights == 0
    reached = {m["name"] for m in report.modules if "relative_output_error" in m}
    assert reached == {m["name"] for m in report.modules if "vision" not in m["name"]}
    note = report.document["partly_calibrated"]
    assert note.startswith(
        "calibrated are the layers in model.language_model.layers; 6 other layers (vision_tower."
    )
    assert note in progress.said
    kept = json.loads((tmp_path / "out/conversion.json").read_text())
    assert kept["partly_calibrated"] == note
    with pytest.raises(OptionError, match="target_bits chooses bits by running the text through"):
        convert(source, tmp_path / "other", calibrated(text, target_bits=8, samples=2, seqlen=16))


@pytest.mark.parametrize("ignore", [(), ("vision_model*",)])
def test_a_tower_that_reads_text_is_run_without_the_whole_model(ignore, text, tmp_path):
    source = save_model("CLIPModel", tmp_path / "model")
    report = convert(source, tmp_path / "out", options(text, samples=32, ignore=ignore))
    reached = {m["name"] for m in report.modules if "relative_output_error" in m}
    assert reached == {m["name"] for m in report.modules if m["name"].startswith("text_model.")}
    note = report.document.get("partly_calibrated", "")
    named = "the layers in text_model.encoder.layers; 6 other layers (vision_model.encoder.layers.*"
    assert (named in note) == (not ignore)
    convert(source, tmp_path / "plain", SketchConfig(effort="fast", bits=2, groups_per_row=1))
    tokens = torch.randint(2, 128, (4, 32), generator=torch.Generator().manual_seed(1))
    errors = [output_error("CLIPModel", source, tmp_path / n, tokens) for n in ("out", "plain")]
    assert errors[0] < errors[1]


def test_what_cannot_be_tuned_or_run_is_refused(text, tmp_path):
    for name, message, changes in [
        ("CLIPModel", "CLIPModel has no output layer", {"heal": 2}),
        ("Gemma3nForCausalLM", r"last 1 blocks use keys and values of earlier blocks", {}),
        ("BertModel", "BertModel has no output layer", {"heal": 2}),
        ("BartForConditionalGeneration", "has an encoder and a decoder, which --heal", {"heal": 2}),
    ]:
        source = save_model(name, tmp_path / name)
        with pytest.raises(CalibrationError, match=message):
            convert(source, tmp_path / f"out-{name}", options(text, **changes))
