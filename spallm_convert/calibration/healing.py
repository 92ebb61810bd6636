"""Healing: the tables of a sketched model tuned until it predicts what the dense model predicts.

Index maps stay as they are. The loss is the divergence of next-token distributions, KL(dense ||
sketched), on the calibration text; nothing but that text is needed, and no labels. The dense model
is not in memory: its hidden states after the last block are at hand from calibration, and norm and
head are the same in both models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from spallm_convert.devices import fast_products, peak_memory
from spallm_convert.linear import SketchedLinear
from spallm_convert.quantizer import train_tables_only

from .blocks import Blocks

#: AdamW's, for entries of root mean square 1: a table's rate is in proportion to its entries, so
#: that models with small weights and with large ones take steps of the same consequence. It falls
#: linearly to zero after a tenth of the steps.
LEARNING_RATE = 1.5e-3
_BETAS = (0.9, 0.95)  # a few hundred steps: 0.999 would remember the first of them to the end
#: Tokens of a step: their logits are in memory twice, in the precision that the model computes in.
STEP_TOKENS = 1024
#: One of so many sequences is not trained on and tells what is gained.
HELD_OUT = 8
#: Times that these are measured. A short text is soon learned by heart: the best state is kept.
_CHECKS = 10
#: Tokens whose distributions are in float32 at a time.
_AT_ONCE = 128


class Healed(NamedTuple):
    """tables: float32 [out_features, groups, 2^bits] by path in the model; before, after: nats per
    token of KL(dense || sketched) on sequences that were not trained on."""

    tables: dict[str, Tensor]
    before: float
    after: float


def heal(
    blocks: Blocks,
    sketches: Callable[[str, nn.Linear], SketchedLinear | None],
    tokens: Tensor,
    final: list[Tensor],
    *,
    steps: int,
    seed: int,
    say: Callable[[str], None],
) -> Healed:
    """Tunes the tables of a whole model for some steps.

    sketches: gives the sketched layer for a path and its dense layer, with float32 tables; tokens:
    int64 [samples, seqlen], the calibration text; final: hidden states of the dense model after its
    last block, by batch. Deterministic for a seed; no global random state is used.
    """
    model = blocks.assemble(sketches)
    train_tables_only(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SketchedLinear)}
    pairs = list(zip(torch.split(tokens, 1), torch.split(torch.cat(final), 1), strict=True))
    held_out = pairs[::HELD_OUT]
    trained = [pair for n, pair in enumerate(pairs) if n % HELD_OUT] or pairs
    tables = [layer.weight_table for layer in layers.values()]
    optimizer = torch.optim.AdamW(
        [{"params": [table], "lr": LEARNING_RATE * _root_mean_square(table)} for table in tables],
        betas=_BETAS,
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    batches = _batches(trained, max(1, STEP_TOKENS // tokens.shape[1]), seed)
    before = least = _mean_loss(blocks, model, held_out)
    best = [table.detach().clone() for table in tables]
    begin = time.monotonic()
    for step in range(1, steps + 1):
        loss = _loss(blocks, model, *next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(tables, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % -(-steps // _CHECKS) == 0 or step == steps:
            now = _mean_loss(blocks, model, held_out)
            if now < least:
                least, best = now, [table.detach().clone() for table in tables]
            left = (time.monotonic() - begin) / step * (steps - step)
            say(f"healing: step {step} of {steps}, {now:.4f} nats apart, {left:.0f} s left")
    say(_summary(before, least, time.monotonic() - begin, peak_memory(blocks.device)))
    return Healed(dict(zip(layers, best, strict=True)), before, least)


def rate_factor(step: int, steps: int) -> float:
    """Share of the learning rate in a step: up over a tenth of the steps, then down to zero."""
    warm_up = max(1, steps // 10)
    return min((step + 1) / warm_up, max(0.0, (steps - step) / max(1, steps - warm_up)))


class Divergence(torch.autograd.Function):
    """KL(expected || found) of next-token distributions, the sum over tokens in nats, from logits
    [tokens, vocab]. Keeps their gradient alone, in their own dtype, where autograd would keep five
    float32 tensors of that size."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, expected: Tensor) -> Tensor:
        total = found.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(found)
        for start in range(0, len(found), _AT_ONCE):
            rows = slice(start, start + _AT_ONCE)
            q, p = (log_softmax(logits[rows].float(), -1) for logits in (found, expected))
            weights = p.exp()
            total += (weights * (p - q)).sum()
            gradient[rows] = q.exp() - weights
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None


def _summary(before: float, after: float, seconds: float, peak: int | None) -> str:
    memory = "" if peak is None else f", peak memory {peak / 1e9:.1f} GB"
    apart = f"{before:.4f} -> {after:.4f} nats per token from the dense model"
    return f"healed: {apart}, {seconds:.0f} s{memory}"


def _root_mean_square(table: Tensor) -> float:
    return table.detach().square().mean().sqrt().item()


def _batches(
    pairs: list[tuple[Tensor, Tensor]], size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences at random, each once before any comes again."""
    generator = np.random.default_rng(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += generator.permutation(len(pairs)).tolist()
        chosen, waiting = [pairs[n] for n in waiting[:size]], waiting[size:]
        yield torch.cat([ids for ids, _ in chosen]), torch.cat([states for _, states in chosen])


def _loss(blocks: Blocks, model: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    """KL(dense || sketched), nats per token."""
    with fast_products(blocks.device):
        with torch.no_grad():
            expected = blocks.logits(ids, hidden)
        found = model(ids.to(blocks.device), use_cache=False).logits
    flat = found.flatten(0, 1), expected.flatten(0, 1)
    total: Tensor = Divergence.apply(*flat)  # type: ignore[no-untyped-call]
    return total / ids.numel()


@torch.no_grad()
def _mean_loss(blocks: Blocks, model: Any, pairs: list[tuple[Tensor, Tensor]]) -> float:
    return sum(_loss(blocks, model, *pair).item() for pair in pairs) / len(pairs)
