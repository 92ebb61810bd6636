"""Perplexity of a causal language model on a text, in windows that may overlap.

A model takes so many tokens at a time. The text is gone through in windows of that many, each
`stride` tokens on from the one before, and in each window only the losses of tokens that no window
before has counted are added up:

    tokens       0 1 2 3 4 5 6 7 8 9
    window 1     . x x x                  window 4, stride 2
    window 2         . . x x              . context only
    window 3             . . x x          x counted
    window 4                 . . x x

So every token but the very first, which nothing predicts, is counted once, and after the first
window with at least window - stride tokens before it. With stride == window the windows do not
overlap, and the first token of each is context only.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spallm_convert.errors import EvaluationError, OptionError
from spallm_convert.progress import Progress, Silent
from spallm_convert.source.causal import check_tokens, predicts_next_token

#: Logits turned to float32 at a time: 64 MiB of them, whatever window and vocabulary.
_CHUNK_LOGITS = 1 << 24
#: Of a text that only so many tokens are wanted of, this many characters for each are tokenised.
_CHARACTERS = 32


@dataclass(frozen=True)
class TextLoss:
    """Losses over a text: their sum in nats, and how many tokens were counted."""

    nats: float
    tokens: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats_per_token); inf where no float64 holds it."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf


def perplexity(
    model: Any,
    tokens: torch.Tensor,
    *,
    window: int = 1024,
    stride: int | None = None,
    progress: Progress | None = None,
) -> float:
    """exp of the mean negative log-likelihood per token, in nats; see `text_loss`."""
    return text_loss(model, tokens, window=window, stride=stride, progress=progress).perplexity


@torch.no_grad()
def text_loss(
    model: Any,
    tokens: torch.Tensor,
    *,
    window: int = 1024,
    stride: int | None = None,
    progress: Progress | None = None,
) -> TextLoss:
    """The losses of a causal language model, dense or sketched, over a text.

    tokens: int64 [n], n of at least 2. Windows of `window` tokens start every `stride` tokens
    (`window`, unless given: they do not overlap); which tokens count is said at the top of this
    file. The model runs where it is, in its own dtype and in evaluation mode; losses are computed
    from its logits in float32 and added in float64.
    Raises OptionError for tokens, window or stride that cannot be used, EvaluationError when the
    model does not predict next tokens, or gives losses that are not finite.
    """
    stride = window if stride is None else stride
    _check_request(model, tokens, window, stride)
    options = _forward_options(model)
    progress = progress or Silent()
    progress.start(len(tokens))
    nats, counted, done = 0.0, 0, 0
    with _evaluating(model):
        for start in range(0, len(tokens), stride):
            end = min(start + window, len(tokens))
            new = end - max(done, start + 1)  # the first token of a window has no prediction
            if new > 0:
                losses = _last_losses(model, tokens[start:end], new, options)
                nats += _finite_sum(losses, end)
                counted += new
            progress.advance(end - done)
            done = end
            if done == len(tokens):
                break
    return TextLoss(nats, counted)


def _last_losses(
    model: Any, part: torch.Tensor, count: int, options: dict[str, Any]
) -> torch.Tensor:
    """Losses of the last `count` tokens of a window, float32 [count] on the CPU."""
    if "logits_to_keep" in options:
        options = options | {"logits_to_keep": count + 1}
    output = model(part[None].to(_device(model)), **options)
    logits = getattr(output, "logits", None)
    if logits is None:
        raise EvaluationError(
            f"{type(model).__name__} gives no logits, so it has no perplexity: a causal language "
            f"model is needed"
        )
    if logits.ndim != 3 or logits.shape[1] not in {len(part), count + 1}:
        raise EvaluationError(
            f"{type(model).__name__} gives logits of shape {list(logits.shape)} for {len(part)} "
            f"tokens, expected [1, tokens, vocabulary]"
        )
    logits = logits[0, -count - 1 : -1]
    targets = part[-count:].to(logits.device)
    rows = max(1, _CHUNK_LOGITS // logits.shape[-1])
    losses = [
        torch.nn.functional.cross_entropy(some.float(), wanted, reduction="none")
        for some, wanted in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
    ]
    return torch.cat(losses).cpu()


def _finite_sum(losses: torch.Tensor, end: int) -> float:
    total = float(losses.double().sum())
    if not math.isfinite(total):
        bad = int((~losses.isfinite()).nonzero()[0])
        raise EvaluationError(
            f"the loss of token {end - len(losses) + bad} is {float(losses[bad])}: the model's "
            f"weights or activations are not finite in this dtype"
        )
    return total


def check_windows(window: int, stride: int) -> None:
    """Raises OptionError unless windows of this size and distance can be measured."""
    if window < 2 or not 1 <= stride <= window:
        raise OptionError(
            f"window must be at least 2 tokens and stride from 1 to window, found window {window} "
            f"and stride {stride}"
        )


def evaluate_text(
    model: Any,
    tokenizer: Any,
    documents: Sequence[str],
    *,
    window: int = 1024,
    stride: int = 512,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a model on a text: tokens counted, nats per token, perplexity, bits per byte.

    documents: as `read_documents` gives them; they are joined by blank lines and tokenised with
    the special tokens that the tokenizer adds to one text. limit: measure only that many tokens
    from the start. Bits per byte are per byte of UTF-8, None where the tokenizer cannot say what
    text its tokens stand for. Raises OptionError for a text of fewer than 2 tokens, and what
    `text_loss` raises.
    """
    tokens, nbytes = _tokens_of(tokenizer, "\n\n".join(documents), limit)
    loss = text_loss(model, tokens, window=window, stride=stride, progress=progress)
    # Without overlap some tokens are not counted: they are taken to be like the others.
    bits = loss.nats_per_token * (len(tokens) - 1) / math.log(2)
    return {
        "tokens": loss.tokens,
        "nats_per_token": loss.nats_per_token,
        "perplexity": loss.perplexity,
        "bits_per_byte": bits / nbytes if nbytes else None,
    }


def _tokens_of(tokenizer: Any, text: str, limit: int | None) -> tuple[torch.Tensor, int | None]:
    """Tokens of a text, int64 [n], and the bytes that all of them but the first stand for."""
    # verbose=False: no remark that this is longer than the model's context.
    encoded = tokenizer(text[: limit and limit * _CHARACTERS], verbose=False)
    if limit is not None and len(encoded["input_ids"]) < 2 * limit:  # too near to where it was cut
        encoded = tokenizer(text, verbose=False)
    tokens = encoded["input_ids"][:limit]
    if not tokens or not encoded.is_fast:
        return torch.tensor(tokens), None
    first = encoded.token_to_chars(0)  # None for a token that stands for no text
    spans = map(encoded.token_to_chars, reversed(range(1, len(tokens))))
    end = next((span.end for span in spans if span), 0)
    return torch.tensor(tokens), len(text[first.end if first else 0 : end].encode())


def _device(model: Any) -> torch.device:
    """Where a model takes its tokens; parameters that are offloaded are nowhere."""
    devices = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return next(devices, torch.device("cpu"))


def _check_request(model: Any, tokens: torch.Tensor, window: int, stride: int) -> None:
    """Refuses what cannot be measured before anything runs."""
    if tokens.ndim != 1 or len(tokens) < 2 or tokens.dtype != torch.int64:
        raise OptionError(
            f"the tokens to measure must be int64 [n] with n of at least 2, found {tokens.dtype} "
            f"{list(tokens.shape)}"
        )
    check_windows(window, stride)
    name = type(model).__name__
    if not predicts_next_token(model):
        raise EvaluationError(
            f"{name} does not predict the next token, so it has no perplexity: a causal language "
            f"model is needed"
        )
    check_tokens(model, tokens, min(window, len(tokens)), f"window {window}")


def _forward_options(model: Any) -> dict[str, Any]:
    """Arguments that save memory, where a model's code knows them."""
    known = inspect.signature(model.forward).parameters
    return {
        name: value
        for name, value in {"use_cache": False, "logits_to_keep": 0}.items()
        if name in known
    }


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every module as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
