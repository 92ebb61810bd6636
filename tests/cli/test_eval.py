"""The `eval` command: perplexity of a text, tasks of the harness, and what cannot be run."""

import json
import math
import sys
from types import ModuleType

import pytest
import torch

import spallm_convert
from helpers.tiny_gguf import save_tiny_gguf
from helpers.tiny_tokenizer import tiny_tokenizer
from spallm_convert import perplexity
from spallm_convert.cli import main
from spallm_convert.evaluation import perplexity as evaluation
from spallm_convert.evaluation.opening import load_any
from spallm_convert.source.text import english_text


@pytest.mark.parametrize("kind", ["dense", "sketched"])
def test_the_command_measures_either_kind(run, evaluated, kind):
    options = ["--text", "builtin", "--tokens", 300, "--window", 64, "--stride", 48]
    document = json.loads(run("eval", evaluated[kind], *options, "--dtype", "float32", "--json"))
    model, tokenizer = load_any(str(evaluated[kind]), dtype="float32", device="cpu")
    tokens = torch.tensor(tokenizer(english_text(), verbose=False)["input_ids"][:300])
    expected = perplexity(model, tokens, window=64, stride=48)
    assert document.pop("perplexity") == pytest.approx(expected, rel=1e-6)
    assert document.pop("nats_per_token") == pytest.approx(math.log(expected), rel=1e-6)
    assert document.pop("bits_per_byte") > 0
    assert document == {
        "model": str(evaluated[kind]),
        "text": "builtin",
        "window": 64,
        "stride": 48,
        "tokens": 299,
    }
    out = run("eval", evaluated[kind], *options, "--dtype", "float32", "-q")
    assert "299 tokens of builtin counted, window 64, stride 48" in out
    assert f"perplexity: {expected:.4f}" in out
    assert "bits per byte of the text: " in out


def test_the_command_and_python_have_the_same_defaults(run, evaluated):
    options = ["--text", "builtin", "--tokens", 2000, "--json"]
    document = json.loads(run("eval", evaluated["sketched"], *options))
    model, tokenizer = spallm_convert.load_any(evaluated["sketched"])
    documents = spallm_convert.read_documents("builtin")
    tokens = torch.tensor(tokenizer(documents[0], verbose=False)["input_ids"][:2000])
    assert document["perplexity"] == spallm_convert.perplexity(model, tokens)
    found = spallm_convert.evaluate_text(model, tokenizer, documents, limit=2000)
    assert {name: document[name] for name in found} == found
    assert (document["window"], document["stride"]) == (1024, 512)


def test_a_small_window_has_a_smaller_stride(run, evaluated):
    options = ["--text", "builtin", "--tokens", 300, "--window", 64, "--json"]
    document = json.loads(run("eval", evaluated["dense"], *options))
    assert (document["window"], document["stride"], document["tokens"]) == (64, 32, 299)


def test_the_command_says_if_a_text_is_cut(evaluated, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("spallm_convert.source.text._MOST_CHARACTERS", 100)
    (tmp_path / "long.txt").write_text("some words " * 50)
    with pytest.raises(SystemExit):
        main(["eval", str(evaluated["dense"]), "--text", str(tmp_path / "long.txt")])
    captured = capsys.readouterr()
    assert "long.txt': only its first 98 characters are used\n" in captured.err
    assert "perplexity: " in captured.out


@pytest.mark.filterwarnings("default")  # GGUF reading is transformers' and gguf's own
def test_the_command_measures_a_gguf_file(run, tmp_path):
    """A tiny one: the test of the demo measures a real model."""
    path = save_tiny_gguf(tmp_path / "model.gguf")
    windows = ["--window=64", "--stride=32"]
    document = json.loads(run("eval", path, "--text=builtin", "--tokens=256", *windows, "--json"))
    model, tokenizer = load_any(str(path), device="cpu")
    tokens = torch.tensor(tokenizer(english_text(), verbose=False)["input_ids"][:256])
    assert document["tokens"] == 255
    assert document["perplexity"] == perplexity(model, tokens, window=64, stride=32)
    assert document["bits_per_byte"] > 0


def test_progress_is_told_on_stderr(evaluated, capsys):
    options = ["--text", "builtin", "--tokens", "2000", "--window", "100", "--stride", "100"]
    with pytest.raises(SystemExit):
        main(["eval", str(evaluated["dense"]), *options])
    err = capsys.readouterr().err.splitlines()
    assert err == [f"{10 * tenth}% of 2,000 tokens measured" for tenth in range(1, 11)]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "give --text, --tasks, or both"),
        (["--text", "nowhere.txt"], 1, "text 'nowhere.txt': no such file; accepted are"),
        (["--text", "builtin", "--stride", "0"], 2, "window 1024 and stride 0"),
        (["--text", "builtin", "--window", "4096"], 2, "more than the 2048 positions"),
        (["--text", "builtin", "--revision", "main"], 1, "--revision is for models on the Hub"),
        (["--tasks", "arc"], 2, "pip install 'spallm-convert[eval]'"),
    ],
)
def test_command_lines_that_cannot_be_run(run, evaluated, monkeypatch, options, code, message):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert message in run("eval", evaluated["dense"], *options, code=code)


def test_json_has_null_for_what_is_no_finite_number(run, evaluated, monkeypatch):
    found = {"tokens": 3, "nats_per_token": 800.0, "perplexity": math.inf, "bits_per_byte": None}
    monkeypatch.setattr(evaluation, "evaluate_text", lambda *_, **__: found)
    document = json.loads(
        run("eval", evaluated["dense"], "--text", "builtin", "--json"),
        parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
    )
    assert {name: document[name] for name in found} == found | {"perplexity": None}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(run, evaluated):
    for device in ("cuda", "cuda:1"):
        err = run("eval", evaluated["dense"], "--text", "builtin", "--device", device, code=2)
        assert f"device {device}: torch finds no GPU here" in err


def test_models_that_cannot_be_measured(run, evaluated, tiny_llama, tmp_path):
    text = ["--text", "builtin", "--tokens", "100"]
    assert "no such folder or file" in run("eval", tmp_path / "nowhere", *text, code=1)
    line = run("eval", tiny_llama.folder, *text, code=1)
    assert f"tokenizer cannot be loaded (no tokenizer files in {tiny_llama.folder})" in line
    config = json.loads((evaluated["dense"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "found no weights" in run("eval", tmp_path, *text, code=1)
    weights = (evaluated["dense"] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    for change, message in [
        ({"num_hidden_layers": 3}, "tensors are missing: model.layers.2"),
        ({"hidden_size": 32}, "transformers cannot load it"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized (gptq)"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        assert message in run("eval", tmp_path, *text, code=1)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "x.gguf: transformers cannot read it" in run("eval", tmp_path / "x.gguf", *text, code=1)


def fake_harness(monkeypatch, answer):
    """A stand-in for lm_eval, which takes the arguments that lm_eval 0.4 takes."""
    calls = []

    class HFLM:
        def __init__(self, pretrained, *, tokenizer=None, batch_size=1):
            self.parts = (pretrained, tokenizer, batch_size)

    def simple_evaluate(model, model_args=None, tasks=None, *, log_samples=True):
        calls.append((model.parts, tasks, log_samples))
        return answer(tasks)

    package, models, module = (
        ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")
    )
    package.simple_evaluate, module.HFLM = simple_evaluate, HFLM
    for part in (package, models, module):
        monkeypatch.setitem(sys.modules, part.__name__, part)
    return calls


RESULTS = {
    "arc_easy": {
        "alias": "arc_easy",
        "sample_len": 10,
        "acc,none": 0.25,
        "acc_stderr,none": 0.125,
        "acc_norm,none": 0.5,
        "acc_norm_stderr,none": "N/A",
    },
    "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.0625},
}


def test_tasks_run_on_the_loaded_model(run, evaluated, monkeypatch):
    calls = fake_harness(monkeypatch, lambda tasks: {"results": RESULTS})
    out = run("eval", evaluated["sketched"], "--tasks", "arc_easy, gsm8k")
    assert out.splitlines() == [
        "arc_easy, acc: 0.2500 +- 0.1250",
        "arc_easy, acc_norm: 0.5000",
        "gsm8k, exact_match (strict-match): 0.0625",
    ]
    ((model, tokenizer, batch), tasks, log_samples) = calls[0]
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokenizer("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]
    assert (batch, tasks, log_samples) == (8, ["arc_easy", "gsm8k"], False)
    document = json.loads(run("eval", evaluated["sketched"], "--tasks", "arc_easy", "--json"))
    assert document["tasks"] == {
        "arc_easy": {"acc": 0.25, "acc stderr": 0.125, "acc_norm": 0.5},
        "gsm8k": {"exact_match (strict-match)": 0.0625},
    }


def test_what_the_harness_raises_is_one_line(run, evaluated, monkeypatch):
    def unknown(tasks):
        raise KeyError(tasks[0])

    fake_harness(monkeypatch, unknown)
    err = run("eval", evaluated["dense"], "--tasks", "nothing", code=1)
    assert err.count("\n") == 1
    assert "lm-evaluation-harness, tasks nothing: KeyError: 'nothing'" in err
