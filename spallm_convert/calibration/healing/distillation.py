"""Distillation: tune the tables of a whole model towards the dense model's predictions.

The loss is the divergence of next-token distributions, KL(dense || sketched). The dense model is
not in memory. Its predictions are computed from its hidden states after the last block, which are
kept, and from the final norm and the head, which are the same in both models.
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
from spallm_convert.calibration.blocks.stand_ins import run_model
from spallm_convert.devices import fast_products
from spallm_convert.errors import CalibrationError

from .tuning import TableTuner, shuffled_forever, split_batches

#: Tokens of a step, one sample at least. Their logits are in memory three times, in the precision
#: that the model computes in.
STEP_TOKENS = 1024
#: Number of times that the divergence is measured during training.
_CHECKS = 10
#: Number of tokens whose distributions are in float32 at a time.
_AT_ONCE = 128


class Distilled(NamedTuple):
    """The result of a distillation.

    Attributes:
        tables: The best tables by path in the model, float32 [out_features, groups, 2^bits].
        before: KL(dense || sketched) on held-out samples before training, in nats per token.
        after: The same with the best tables.
    """

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
    """Tune the tables of a whole model.

    The samples' order depends on the seed alone; no global random state is used.

    Args:
        blocks: The blocks that `model` was assembled from.
        model: The assembled model, whose sketched layers have float32 tables.
        better: Tables to begin with, by path in the model. The dict is emptied to save memory.
        tokens: The text, int64 [samples, seqlen].
        final: Hidden states of the dense model after its last block, by batch.
        steps: Number of optimizer steps.
        dtype: The dtype that tables are stored in.
        seed: Seed of the order of samples.
        say: Gets a line at every measurement.

    Returns:
        The tables with the smallest divergence on the held-out samples.

    Raises:
        CalibrationError: Predictions are not finite, or no gradient is.
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
            f"{type(model).__name__}: its predictions on the healing text are not all finite; "
            f"check the model with spallm-convert eval MODEL --text SRC"
        )
    tuner = TableTuner(model, steps, before, dtype)
    tuner.put(better)
    better.clear()  # frees a copy of all tables
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
            say(f"healing: step {step} of {steps}, KL {now:.4f} nats per token, {left:.0f} s left")
    tuner.check_steps(type(model).__name__)
    return Distilled(tuner.put_best(), before, tuner.least)


class Divergence(torch.autograd.Function):
    """KL(expected || found) of next-token distributions from logits [tokens, vocab].

    The result is the sum over tokens in nats. For the backward pass only the gradient is kept, in
    the logits' own dtype. Plain autograd would keep five float32 tensors of the logits' size.
    """

    @staticmethod
    def forward(ctx: Any, found: Tensor, expected: Tensor) -> Tensor:
        total = found.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(found) if ctx.needs_input_grad[0] else None
        for start in range(0, len(found), _AT_ONCE):
            rows = slice(start, start + _AT_ONCE)
            q, p = (log_softmax(logits[rows].float(), -1) for logits in (found, expected))
            weights = p.exp()
            # If both models rule a token out, p and q are -inf and their difference is NaN. If the
            # dense model predicts NaN, so is its weight, and the total must be NaN too.
            total += torch.where(weights == 0, 0, weights * (p - q)).sum()
            if gradient is not None:
                gradient[rows] = q.exp() - weights
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None


def _divergence(blocks: Blocks, model: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    """Return KL(dense || sketched) in nats per token."""
    with fast_products(blocks.device):
        with torch.no_grad():
            expected = blocks.logits(ids, hidden)
        found = run_model(model, ids.to(blocks.device)).logits
    flat = found.flatten(0, 1), expected.flatten(0, 1)
    total: Tensor = Divergence.apply(*flat)  # type: ignore[no-untyped-call]
    return total / ids.numel()
