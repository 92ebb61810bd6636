"""Perplexity: against plain float64, every token counted once; unusable requests."""

import math
from types import SimpleNamespace

import pytest
import torch

from helpers.tiny_tokenizer import tiny_tokenizer
from spallm_convert import OptionError, perplexity
from spallm_convert.errors import EvaluationError
from spallm_convert.evaluation import perplexity as evaluation
from spallm_convert.evaluation.opening import load_any
from spallm_convert.evaluation.perplexity import evaluate_text, text_loss
from spallm_convert.source.text import english_text

TOKENS = torch.randint(0, 128, (100,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["dense", "sketched"])
def model(request, evaluated):
    return load_any(str(evaluated[request.param]), dtype="float32")[0]


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


@pytest.mark.parametrize(
    ("window", "stride"), [(30, 15), (31, 15), (2, 1), (1024, 512), (1500, 512)]
)
def test_windows_overlap_by_half_unless_told(model, window, stride):
    tokens = TOKENS.repeat(18)
    some = tokens[: 40 * window]
    expected = perplexity(model, some, window=window, stride=stride)
    assert perplexity(model, some, window=window) == expected


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
def test_losses_are_float32_whatever_the_model(evaluated, dtype):
    model = load_any(str(evaluated["dense"]), dtype=str(dtype).removeprefix("torch."))[0]
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


def test_nan_weights_are_refused(evaluated):
    model = load_any(str(evaluated["dense"]), dtype="float32")[0]
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


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification", "BertModel"])
def test_an_encoder_has_no_perplexity(name):
    with pytest.raises(EvaluationError, match=f"{name} does not predict the next token"):
        perplexity(tiny_bert(name), TOKENS)


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


@pytest.mark.parametrize("stride", [10, 7])
def test_every_window_starts_with_the_token_of_the_beginning(model, monkeypatch, stride):
    seen, forward = [], model.forward

    def watched(input_ids, **options):
        seen.append(input_ids[0].tolist())
        return forward(input_ids, **options)

    plain = text_loss(model, TOKENS, window=10, stride=stride)
    monkeypatch.setattr(model, "forward", watched)
    started = text_loss(model, TOKENS, window=10, stride=stride, bos=5)
    assert started.tokens == plain.tokens
    assert started.nats != plain.nats
    starts = [s for s in range(0, 100, stride) if s - stride + 10 < 100]
    assert seen == [[5, *TOKENS[s + 1 : s + 10].tolist()] for s in starts]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("limit", [None, 50])
def test_bits_per_byte_are_those_of_the_text(model, adds_bos, limit):
    documents = ["the theatre in the inner", "other"] * 9
    text = "\n\n".join(documents)
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    found = evaluate_text(model, tokenizer, documents, window=64, stride=32, limit=limit)
    tokens = tokenizer(text)["input_ids"][:limit]
    bos = tokenizer.bos_token_id if adds_bos else None
    loss = text_loss(model, torch.tensor(tokens), window=64, stride=32, bos=bos)
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
