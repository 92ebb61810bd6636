"""Perplexity: against plain float64, every token counted once; the `eval` command; the harness."""

import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from helpers.tiny_models import save_tiny_llama
from helpers.tiny_tokenizer import tiny_tokenizer
from spallm_convert import OptionError, SketchConfig, convert, evaluation, perplexity
from spallm_convert.calibration.text import english_text
from spallm_convert.cli import main
from spallm_convert.errors import EvaluationError
from spallm_convert.evaluation import evaluate_text, text_loss
from spallm_convert.opening import load_any

TOKENS = torch.randint(0, 128, (100,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny dense checkpoint with a tokenizer, and its sketch."""
    root = tmp_path_factory.mktemp("evaluated")
    save_tiny_llama(root / "dense", initializer_range=0.2)
    tiny_tokenizer().save_pretrained(root / "dense")
    convert(root / "dense", root / "sketched", SketchConfig(bits=3))
    return {kind: root / kind for kind in ("dense", "sketched")}


@pytest.fixture(scope="module", params=["dense", "sketched"])
def model(request, folders):
    return load_any(str(folders[request.param]), dtype="float32")[0]


@pytest.fixture
def run(capsys):
    def call(*arguments, code=0):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert stopped.value.code == code, captured.err
        return captured.err if code else captured.out

    return call


def plain_losses(model, tokens, window, stride):
    """Position and float64 loss of every token counted, one forward pass per token."""
    losses = {}
    for start in range(0, len(tokens), stride):
        for position in range(start + 1, min(start + window, len(tokens))):
            if position not in losses:
                with torch.no_grad():
                    logits = model(tokens[None, start:position]).logits[0, -1].double()
                losses[position] = -logits.log_softmax(0)[tokens[position]].item()
    return losses


@pytest.mark.parametrize(
    ("window", "stride", "counted"),
    [
        (10, 10, 90),
        (10, 5, 99),
        (10, 1, 99),
        (16, 7, 99),
        (33, 33, 96),  # a last window of one token, which nothing predicts
        (64, 48, 99),
        (99, 98, 99),
        (100, 100, 99),
        (100, 1, 99),
        (2000, 512, 99),
        (2, 1, 99),
        (2, 2, 50),
    ],
)
def test_it_is_that_of_plain_float64(model, window, stride, counted):
    expected = plain_losses(model, TOKENS, window, stride)
    assert len(expected) == counted
    loss = text_loss(model, TOKENS, window=window, stride=stride)
    assert loss.tokens == counted
    assert loss.nats == pytest.approx(sum(expected.values()), rel=1e-5)
    assert loss.nats_per_token == loss.nats / counted
    measured = perplexity(model, TOKENS, window=window, stride=stride)
    assert measured == math.exp(loss.nats / counted)
    assert 100 < measured < 10_000


@pytest.mark.parametrize("chunk", [1, 128, 128 * 3, 128 * 99])
def test_pieces_of_logits_do_not_change_it(model, monkeypatch, chunk):
    expected = text_loss(model, TOKENS, window=70, stride=33)
    monkeypatch.setattr(evaluation, "_CHUNK_LOGITS", chunk)
    loss = text_loss(model, TOKENS, window=70, stride=33)
    assert loss.tokens == expected.tokens
    assert loss.nats == pytest.approx(expected.nats, rel=1e-6)


def test_windows_do_not_overlap_unless_told(model):
    assert perplexity(model, TOKENS, window=30) == perplexity(model, TOKENS, window=30, stride=30)


def test_only_the_logits_that_count_are_asked_for(model, monkeypatch):
    sizes = []
    handle = model.lm_head.register_forward_hook(
        lambda module, inputs, output: sizes.append(output.shape[1])
    )
    perplexity(model, TOKENS, window=40, stride=20)
    handle.remove()
    assert sizes == [40, 21, 21, 21]


def test_a_model_without_that_option_gives_the_same(model, monkeypatch):
    expected = perplexity(model, TOKENS, window=40, stride=20)
    forward = model.forward

    def plain(input_ids):
        return forward(input_ids)

    monkeypatch.setattr(model, "forward", plain)
    assert perplexity(model, TOKENS, window=40, stride=20) == pytest.approx(expected, rel=1e-6)


def test_progress_is_told(model):
    calls = []
    progress = SimpleNamespace(start=calls.append, advance=calls.append)
    text_loss(model, TOKENS, window=40, stride=20, progress=progress)
    assert calls == [100, 40, 20, 20, 20]


def test_it_evaluates_and_leaves_modes_as_they_were(model):
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    seen = []
    handle = model.lm_head.register_forward_pre_hook(
        lambda *_: seen.append(any(module.training for module in model.modules()))
    )
    perplexity(model, TOKENS)
    handle.remove()
    assert seen == [False]
    assert {name: module.training for name, module in model.named_modules()} == before
    assert len(set(before.values())) == 2
    model.eval()


def test_huge_losses_have_no_finite_perplexity():
    assert evaluation.TextLoss(1e6, 10).perplexity == math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_whatever_the_model(folders, dtype):
    model = load_any(str(folders["dense"]), dtype=str(dtype).removeprefix("torch."))[0]
    with torch.no_grad():
        logits = model(TOKENS[None]).logits
    assert logits.dtype == dtype
    losses = torch.nn.functional.cross_entropy(logits[0, :-1].double(), TOKENS[1:])
    assert perplexity(model, TOKENS) == pytest.approx(losses.exp().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (TOKENS[:1], {}, r"n of at least 2, found torch.int64 \[1\]"),
        (TOKENS[None], {}, r"found torch.int64 \[1, 100\]"),
        (TOKENS.int(), {}, r"must be int64 \[n\] .* found torch.int32 \[100\]"),
        (TOKENS - 100, {}, "token -.* is not in the vocabulary of LlamaForCausalLM, which has 128"),
        (TOKENS, {"window": 1}, "window 1 and stride 1"),
        (TOKENS, {"window": 8, "stride": 9}, "window 8 and stride 9"),
        (TOKENS, {"window": 8, "stride": 0}, "window 8 and stride 0"),
        (TOKENS + 100, {}, "token 227 is not in the vocabulary of LlamaForCausalLM, .* has 128"),
        (TOKENS.repeat(21), {"window": 2049}, "window 2049 is more than the 2048 positions"),
    ],
)
def test_unusable_requests(model, tokens, options, message):
    with pytest.raises(OptionError, match=message):
        perplexity(model, tokens, **options)


def test_nan_weights_are_refused(folders):
    model = load_any(str(folders["dense"]), dtype="float32")[0]
    model.model.norm.weight.data[3] = math.nan
    with pytest.raises(EvaluationError, match="the loss of token 1 is nan: the model's weights or"):
        perplexity(model, TOKENS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_placed(model, monkeypatch, value):
    def forward(input_ids):
        logits = torch.zeros(*input_ids.shape, 128)
        logits[input_ids == 77] = value
        return SimpleNamespace(logits=logits)

    monkeypatch.setattr(model, "forward", forward)
    tokens = torch.zeros(50, dtype=torch.int64)
    assert perplexity(model, tokens, window=16, stride=8) == pytest.approx(128)
    tokens[30] = 77
    with pytest.raises(EvaluationError, match="the loss of token 31 is nan"):
        perplexity(model, tokens, window=16, stride=8)


def tiny_bert(name):
    import transformers

    config = transformers.BertConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    return getattr(transformers, name)(config)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_an_encoder_has_no_perplexity(name):
    with pytest.raises(EvaluationError, match=f"{name} does not predict the next token"):
        perplexity(tiny_bert(name), TOKENS)


def test_without_logits_there_is_no_perplexity():
    with pytest.raises(EvaluationError, match="BertModel gives no logits"):
        perplexity(tiny_bert("BertModel"), TOKENS)


def test_an_encoder_decoder_has_no_perplexity():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=128, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16)
    with pytest.raises(EvaluationError, match="T5ForConditionalGeneration does not predict"):
        perplexity(T5ForConditionalGeneration(config), TOKENS)


def test_logits_of_another_shape_are_refused(model, monkeypatch):
    pooled = SimpleNamespace(logits=torch.zeros(1, 128))
    monkeypatch.setattr(model, "forward", lambda input_ids: pooled)
    with pytest.raises(EvaluationError, match=r"logits of shape \[1, 128\] for 100 tokens"):
        perplexity(model, TOKENS)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("limit", [None, 50])
def test_bits_per_byte_are_those_of_the_text(model, adds_bos, limit):
    documents = ["the theatre in the inner", "other"] * 9
    text = "\n\n".join(documents)
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    found = evaluate_text(model, tokenizer, documents, window=64, stride=32, limit=limit)
    tokens = tokenizer(text)["input_ids"][:limit]
    loss = text_loss(model, torch.tensor(tokens), window=64, stride=32)
    covered = tokenizer.decode(tokens[1:])  # a character is a byte here
    assert text.startswith(covered if adds_bos else "th" + covered)
    assert found == {
        "tokens": len(tokens) - 1,
        "nats_per_token": loss.nats_per_token,
        "perplexity": loss.perplexity,
        "bits_per_byte": pytest.approx(loss.nats / math.log(2) / len(covered), rel=1e-12),
    }


def test_of_a_long_text_only_the_start_is_tokenised(model, monkeypatch):
    tokenizer, seen = tiny_tokenizer(), []

    def watched(text, **options):
        seen.append(len(text))
        return tokenizer(text, **options)

    found = evaluate_text(model, watched, [english_text()], limit=64)
    assert seen == [64 * 32]
    whole = torch.tensor(tokenizer(english_text())["input_ids"][:64])
    assert found["perplexity"] == perplexity(model, whole, window=1024, stride=512)
    monkeypatch.setattr(evaluation, "_CHARACTERS", 1)
    assert evaluate_text(model, watched, [english_text()], limit=64) == found
    assert seen[1:] == [64, len(english_text())]


def test_a_text_of_one_token_is_too_short(model):
    with pytest.raises(OptionError, match=r"n of at least 2, found torch.int64 \[1\]"):
        evaluate_text(model, tiny_tokenizer(), ["a"])


def test_a_tokenizer_without_offsets_gives_no_bits_per_byte(model):
    class Slow(dict):
        is_fast = False

    def tokenizer(text, **options):
        return Slow(input_ids=[1, 2, 3, 4])

    found = evaluate_text(model, tokenizer, ["text"])
    assert (found["tokens"], found["bits_per_byte"]) == (3, None)


@pytest.mark.parametrize("kind", ["dense", "sketched"])
def test_the_command_measures_either_kind(run, folders, kind):
    options = ["--text", "builtin", "--tokens", 300, "--window", 64, "--stride", 48]
    document = json.loads(run("eval", folders[kind], *options, "--dtype", "float32", "--json"))
    model, tokenizer = load_any(str(folders[kind]), dtype="float32", device="cpu")
    tokens = torch.tensor(tokenizer(english_text(), verbose=False)["input_ids"][:300])
    expected = perplexity(model, tokens, window=64, stride=48)
    assert document.pop("perplexity") == pytest.approx(expected, rel=1e-6)
    assert document.pop("nats_per_token") == pytest.approx(math.log(expected), rel=1e-6)
    assert document.pop("bits_per_byte") > 0
    assert document == {
        "model": str(folders[kind]),
        "text": "builtin",
        "window": 64,
        "stride": 48,
        "tokens": 299,
    }
    out = run("eval", folders[kind], *options, "--dtype", "float32", "-q")
    assert "299 tokens of builtin counted, window 64, stride 48" in out
    assert f"perplexity: {expected:.4f}" in out
    assert "bits per byte of the text: " in out


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # GGUF reading is transformers' and gguf's own
def test_the_command_measures_a_gguf_file(run):
    from spallm_convert.demo import demo_model

    document = json.loads(run("eval", demo_model(), "--text=builtin", "--tokens=256", "--json"))
    assert document["tokens"] == 255
    assert 5 < document["perplexity"] < 50
    assert 0.5 < document["bits_per_byte"] < 2


def test_progress_is_told_on_stderr(folders, capsys):
    options = ["--text", "builtin", "--tokens", "2000", "--window", "100", "--stride", "100"]
    with pytest.raises(SystemExit):
        main(["eval", str(folders["dense"]), *options])
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
        (["--tasks", "arc"], 2, "pip install 'lm_eval[hf]'"),
    ],
)
def test_command_lines_that_cannot_be_run(run, folders, monkeypatch, options, code, message):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert message in run("eval", folders["dense"], *options, code=code)


def test_json_has_null_for_what_is_no_finite_number(run, folders, monkeypatch):
    found = {"tokens": 3, "nats_per_token": 800.0, "perplexity": math.inf, "bits_per_byte": None}
    monkeypatch.setattr(evaluation, "evaluate_text", lambda *_, **__: found)
    document = json.loads(
        run("eval", folders["dense"], "--text", "builtin", "--json"),
        parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
    )
    assert {name: document[name] for name in found} == found | {"perplexity": None}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(run, folders):
    for device in ("cuda", "cuda:1"):
        err = run("eval", folders["dense"], "--text", "builtin", "--device", device, code=2)
        assert f"device {device}: torch finds no GPU here" in err


def test_models_that_cannot_be_measured(run, folders, tiny_llama, tmp_path):
    text = ["--text", "builtin", "--tokens", "100"]
    assert "no such folder or file" in run("eval", tmp_path / "nowhere", *text, code=1)
    line = run("eval", tiny_llama.folder, *text, code=1)
    assert f"tokenizer cannot be loaded (no file of one is in {tiny_llama.folder})" in line
    config = json.loads((folders["dense"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "found no weights at all" in run("eval", tmp_path, *text, code=1)
    weights = (folders["dense"] / "model.safetensors").read_bytes()
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


def test_tasks_run_on_the_loaded_model(run, folders, monkeypatch):
    calls = fake_harness(monkeypatch, lambda tasks: {"results": RESULTS})
    out = run("eval", folders["sketched"], "--tasks", "arc_easy, gsm8k")
    assert out.splitlines() == [
        "arc_easy, acc: 0.2500 +- 0.1250",
        "arc_easy, acc_norm: 0.5000",
        "gsm8k, exact_match (strict-match): 0.0625",
    ]
    ((model, tokenizer, batch), tasks, log_samples) = calls[0]
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokenizer("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]
    assert (batch, tasks, log_samples) == (8, ["arc_easy", "gsm8k"], False)
    document = json.loads(run("eval", folders["sketched"], "--tasks", "arc_easy", "--json"))
    assert document["tasks"] == {
        "arc_easy": {"acc": 0.25, "acc stderr": 0.125, "acc_norm": 0.5},
        "gsm8k": {"exact_match (strict-match)": 0.0625},
    }


def test_what_the_harness_raises_is_one_line(run, folders, monkeypatch):
    def unknown(tasks):
        raise KeyError(tasks[0])

    fake_harness(monkeypatch, unknown)
    err = run("eval", folders["dense"], "--tasks", "nothing", code=1)
    assert err.count("\n") == 1
    assert "lm-evaluation-harness, tasks nothing: KeyError: 'nothing'" in err
