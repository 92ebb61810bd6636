"""Perplexity of a causal language model on a text, in windows that may overlap.

A model sees `window` tokens at a time. Each window starts `stride` tokens after the window before
it. A window adds up only the losses of tokens that no earlier window has counted:

    tokens       0 1 2 3 4 5 6 7 8 9
    window 1     . x x x                  window 4, stride 2
    window 2         . . x x              . context only
    window 3             . . x x          x counted
    window 4                 . . x x

Nothing predicts the first token of the text. Every other token is counted once, and after the first
window each has at least window - stride tokens before it. If stride == window, the windows do not
overlap, and the first token of each window is context only.

Some models are trained only on texts that start with a beginning-of-text token, and predict badly
without it. If the tokenizer puts one before a text, it takes the place of the first token of every
window, which is never counted. llama.cpp measures in the same way.
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

from .windows import WINDOW, check_windows, default_stride

#: Logits cast to float32 at a time: at most 64 MiB, whatever the window and the vocabulary.
_CHUNK_LOGITS = 1 << 24
#: If only N tokens of a text are measured, this many characters per token are tokenized.
_CHARACTERS = 32


@dataclass(frozen=True)
class TextLoss:
    """Hold the loss of a model on a text.

    Attributes:
        nats: Sum of the losses of all counted tokens, in nats.
        tokens: Number of counted tokens.
    """

    nats: float
    tokens: int

    @property
    def nats_per_token(self) -> float:
        """Return the mean loss of a token, in nats."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Return exp(nats_per_token), or inf if it is larger than any float64."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf


def perplexity(
    model: Any,
    tokens: torch.Tensor,
    *,
    window: int = WINDOW,
    stride: int | None = None,
    bos: int | None = None,
    progress: Progress | None = None,
) -> float:
    """Return the perplexity of a causal language model, dense or sketched, on tokens.

    The perplexity is exp of the mean negative log-likelihood per token. The text is measured in
    windows. A window that starts inside the text counts only its last `stride` tokens, because the
    windows before it have counted the others. The defaults are those of `spallm-convert eval`, so
    the same tokens give the same number.

    The model runs on its own device, in its own dtype and in evaluation mode; its training mode is
    restored afterwards. Losses are computed from the logits in float32 and summed in float64.

    Args:
        model: The model, as `load_sketched`, `load_any` or transformers returns it.
        tokens: Token ids of the text, int64 [n] on any device, n at least 2.
        window: Tokens that the model sees at once, at least 2. At most the number of positions of
            the model if the text is longer than that.
        stride: Tokens from the start of one window to the start of the next, 1 to `window`. None:
            512, or half of `window` if that is less. `window`: the windows do not overlap, and the
            first token of each is not counted.
        bos: Beginning-of-text token to put in place of the first token of every window. None: the
            windows are parts of the text as it is.
        progress: Listener that is told how many tokens are done. None: nothing is reported.

    Returns:
        The perplexity, at least 1; inf if it is larger than any float64.

    Raises:
        OptionError: If the tokens, the window or the stride cannot be used.
        EvaluationError: If the model does not predict next tokens, or a loss is not finite.
    """
    loss = text_loss(model, tokens, window=window, stride=stride, bos=bos, progress=progress)
    return loss.perplexity


@torch.no_grad()
def text_loss(
    model: Any,
    tokens: torch.Tensor,
    *,
    window: int = WINDOW,
    stride: int | None = None,
    bos: int | None = None,
    progress: Progress | None = None,
) -> TextLoss:
    """Return the loss of a causal language model on a text: its sum and the tokens counted.

    Arguments and errors are those of `perplexity`. The top of this file shows which tokens count.
    """
    stride = default_stride(window) if stride is None else stride
    _check_request(model, tokens, window, stride)
    options = _forward_options(model)
    progress = progress or Silent()
    progress.start(len(tokens))
    nats, counted, done = 0.0, 0, 0
    with _evaluating(model):
        for start in range(0, len(tokens), stride):
            end = min(start + window, len(tokens))
            new = end - max(done, start + 1)  # nothing predicts the first token of a window
            if new > 0:
                losses = _last_losses(model, _window(tokens[start:end], bos), new, options)
                nats += _finite_sum(losses, end)
                counted += new
            progress.advance(end - done)
            done = end
            if done == len(tokens):
                break
    return TextLoss(nats, counted)


def _window(part: torch.Tensor, bos: int | None) -> torch.Tensor:
    """Return a part of the text, with `bos` in place of its first token unless it is None."""
    return part if bos is None else torch.cat([part.new_tensor([bos]), part[1:]])


def _last_losses(
    model: Any, part: torch.Tensor, count: int, options: dict[str, Any]
) -> torch.Tensor:
    """Return the losses of the last `count` tokens of a window, float32 [count] on the CPU."""
    if "logits_to_keep" in options:
        options = options | {"logits_to_keep": count + 1}
    output = model(part[None].to(_device(model)), **options)
    logits = getattr(output, "logits", None)
    if logits is None:
        raise EvaluationError(
            f"{type(model).__name__} returns no logits, so its perplexity cannot be measured: a "
            f"causal language model is needed"
        )
    if logits.ndim != 3 or logits.shape[1] not in {len(part), count + 1}:
        raise EvaluationError(
            f"{type(model).__name__} returns logits of shape {list(logits.shape)} for {len(part)} "
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
    """Return the sum of the losses of the tokens before `end`; refuse one that is not finite."""
    total = float(losses.double().sum())
    if not math.isfinite(total):
        bad = int((~losses.isfinite()).nonzero()[0])
        raise EvaluationError(
            f"the loss of token {end - len(losses) + bad} is {float(losses[bad])}: the model's "
            f"weights or activations are not finite in this dtype; try float32"
        )
    return total


def evaluate_text(
    model: Any,
    tokenizer: Any,
    documents: Sequence[str],
    *,
    window: int = WINDOW,
    stride: int | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a causal language model on documents, as `spallm-convert eval --text` does.

    The documents are joined by blank lines and tokenized as one text, with the special tokens that
    the tokenizer adds to a text. The tokens are measured as `perplexity` measures them. If they
    start with the beginning-of-text token, every window does.

    Args:
        model: The model, as `load_any` or `load_sketched` returns it.
        tokenizer: The tokenizer of the model, as `load_any` returns it.
        documents: The text, as `read_documents` returns it.
        window: Tokens that the model sees at once, at least 2.
        stride: Tokens from the start of one window to the start of the next, 1 to `window`. None:
            512, or half of `window` if that is less.
        limit: Measure only this number of tokens, from the start of the text. None: all.
        progress: Listener that is told how many tokens are done. None: nothing is reported.

    Returns:
        A dict with `tokens` (int, the number of counted tokens), `nats_per_token` (float, the mean
        loss), `perplexity` (float, exp of it), and `bits_per_byte` (float, per byte of the text in
        UTF-8; None if the tokenizer cannot map tokens to text).

    Raises:
        OptionError: If the text has fewer than 2 tokens, the tokens do not fit the model, or the
            window or the stride cannot be used.
        EvaluationError: If the model does not predict next tokens, or a loss is not finite.
    """
    tokens, nbytes = _tokens_of(tokenizer, "\n\n".join(documents), limit)
    start = int(tokens[0]) if len(tokens) else None
    bos = start if start == getattr(tokenizer, "bos_token_id", None) else None
    loss = text_loss(model, tokens, window=window, stride=stride, bos=bos, progress=progress)
    # Without overlap some tokens are not counted. Assume that their mean loss is the same.
    bits = loss.nats_per_token * (len(tokens) - 1) / math.log(2)
    return {
        "tokens": loss.tokens,
        "nats_per_token": loss.nats_per_token,
        "perplexity": loss.perplexity,
        "bits_per_byte": bits / nbytes if nbytes else None,
    }


def _tokens_of(tokenizer: Any, text: str, limit: int | None) -> tuple[torch.Tensor, int | None]:
    """Return the tokens of a text, int64 [n], and the bytes that all except the first stand for."""
    # verbose=False: no warning that the text is longer than the model's context.
    encoded = tokenizer(text[: limit and limit * _CHARACTERS], verbose=False)
    if limit is not None and len(encoded["input_ids"]) < 2 * limit:  # tokens near the cut
        encoded = tokenizer(text, verbose=False)
    tokens = encoded["input_ids"][:limit]
    if not tokens or not encoded.is_fast:
        return torch.tensor(tokens), None
    first = encoded.token_to_chars(0)  # None for a token that stands for no text
    spans = map(encoded.token_to_chars, reversed(range(1, len(tokens))))
    end = next((span.end for span in spans if span), 0)
    return torch.tensor(tokens), len(text[first.end if first else 0 : end].encode())


def _device(model: Any) -> torch.device:
    """Return the device of a model's inputs. Offloaded parameters are on no device: skip them."""
    devices = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return next(devices, torch.device("cpu"))


def _check_request(model: Any, tokens: torch.Tensor, window: int, stride: int) -> None:
    """Refuse a request that cannot be measured, before anything runs."""
    if tokens.ndim != 1 or len(tokens) < 2 or tokens.dtype != torch.int64:
        raise OptionError(
            f"the tokens to measure must be int64 [n] with n of at least 2, found {tokens.dtype} "
            f"{list(tokens.shape)}"
        )
    check_windows(window, stride)
    name = type(model).__name__
    if not predicts_next_token(model):
        raise EvaluationError(
            f"{name} does not predict the next token, so its perplexity cannot be measured: a "
            f"causal language model is needed"
        )
    check_tokens(model, tokens, min(window, len(tokens)), f"window {window}")


def _forward_options(model: Any) -> dict[str, Any]:
    """Return the arguments that save memory, if the model's `forward` has them."""
    known = inspect.signature(model.forward).parameters
    return {
        name: value
        for name, value in {"use_cache": False, "logits_to_keep": 0}.items()
        if name in known
    }


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
