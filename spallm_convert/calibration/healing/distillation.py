"""Distillation: the tables of a whole model tuned until it predicts what the dense model predicts.

The loss is the divergence of next-token distributions, KL(dense || sketched). The dense model is
not in memory: its hidden states after the last block are at hand, and norm and head are the same in
both models.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.devices import fast_products
from spallm_convert.errors import CalibrationError

from .tuning import TableTuner, shuffled_forever, split_batches

#: Tokens of a step, one sample at least: their logits are in memory three times, in the precision
#: that the model computes in.
STEP_TOKENS = 1024
#: Times that the divergence is measured.
_CHECKS = 10
#: Tokens whose distributions are in float32 at a time.
_AT_ONCE = 128


class Distilled(NamedTuple):
    """tables: float32 [out_features, groups, 2^bits] by path in the model, as they are stored;
    before, after: nats per token of KL(dense || sketched) on samples that were not trained on."""

    tables: dict[str, Tensor]
    before: float
    after: float


def distill(
    blocks: Blocks,
    model: Any,
    better: dict[str, Tensor],
    tokens: Tensor,
    final: list[Tensor],
    *,
    steps: int,
    dtype: torch.dtype,
    seed: int,
    say: Callable[[str], None],
) -> Distilled:
    """Tunes the tables of a whole model for some steps.

    model: assembled by `blocks`, its sketched layers with float32 tables; better: tables to begin
    with, by path, emptied; tokens: int64 [samples, seqlen], the text; final: hidden states of the
    dense model after its last block, by batch; dtype: that tables are stored in. Deterministic for
    a seed; no global random state is used. Raises CalibrationError for predictions that are not
    finite.
    """
    size = len(final[0])
    trained, held_out = (
        [batch * size + place for batch in batches for place in range(size)]
        for batches in split_batches(len(final))
    )

    def loss(samples: list[int]) -> Tensor:
        states = torch.stack([final[sample // size][sample % size] for sample in samples])
        return _divergence(blocks, model, tokens[samples], states)

    @torch.no_grad()
    def measured() -> float:
        return sum(loss([sample]).item() for sample in held_out) / len(held_out)

    before = measured()
    if not math.isfinite(before):
        raise CalibrationError(
            f"{type(model).__name__}: its predictions on the text of healing are not all finite"
        )
    tuner = TableTuner(model, steps, before, dtype)
    tuner.put(better)
    better.clear()  # a copy less in memory
    tuner.offer(measured())
    samples, begin = shuffled_forever(trained, seed), time.monotonic()
    at_once = max(1, STEP_TOKENS // tokens.shape[1])
    for step in range(1, steps + 1):
        tuner.step(loss([next(samples) for _ in range(at_once)]))
        if step % -(-steps // _CHECKS) == 0 or step == steps:
            with tuner.as_stored():
                now = measured()
                tuner.offer(now)
            left = (time.monotonic() - begin) / step * (steps - step)
            say(f"healing: step {step} of {steps}, {now:.4f} nats apart, {left:.0f} s left")
    return Distilled(tuner.put_best(), before, tuner.least)


class Divergence(torch.autograd.Function):
    """KL(expected || found) of next-token distributions, the sum over tokens in nats, from logits
    [tokens, vocab]. Keeps their gradient alone, in their own dtype, where autograd would keep five
    float32 tensors of that size."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, expected: Tensor) -> Tensor:
        total = found.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(found) if ctx.needs_input_grad[0] else None
        for start in range(0, len(found), _AT_ONCE):
            rows = slice(start, start + _AT_ONCE)
            q, p = (log_softmax(logits[rows].float(), -1) for logits in (found, expected))
            weights = p.exp()
            # Where a model rules a token out both are -inf, and their difference is none.
            total += torch.where(weights > 0, weights * (p - q), 0).sum()
            if gradient is not None:
                gradient[rows] = q.exp() - weights
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None


def _divergence(blocks: Blocks, model: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    """KL(dense || sketched), nats per token."""
    with fast_products(blocks.device):
        with torch.no_grad():
            expected = blocks.logits(ids, hidden)
        found = model(ids.to(blocks.device), use_cache=False).logits
    flat = found.flatten(0, 1), expected.flatten(0, 1)
    total: Tensor = Divergence.apply(*flat)  # type: ignore[no-untyped-call]
    return total / ids.numel()
