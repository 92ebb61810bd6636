"""Measure how much a model's predictions depend on the outputs of each layer.

To second order, an error d in row o of a layer's weight changes the predicted distributions by

    KL(dense || sketched) = 1/2 mean over t of g_to^2 (x_t d^T)^2        nats per token

Here x_t is the layer's input at position t, and g_to is the gradient of the labels' log-likelihood
with respect to output o at position t. Labels are drawn from the dense model's own predictions.
Then the second moment of the gradients is the Fisher matrix, which is the Hessian of the
divergence. Rows, positions and layers are treated as independent, because sketching errors in
different rows are independent.

Of g_to^2 only the means by row and by token are kept, so it is approximated as
g_to^2 = c_t G_o. K-FAC (arXiv 1503.05671) sets c_t to 1, which overstates the tokens whose inputs
are large.

One block is in memory at a time: first forward through all blocks, then backward block by block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.calibration.blocks.stages import check_states
from spallm_convert.calibration.blocks.targets import Target
from spallm_convert.calibration.blocks.watching import Note, watched
from spallm_convert.errors import CalibrationError

#: Tokens of the text that gradients are taken on; one batch at least. The hidden states that enter
#: every block are kept until the backward pass.
TOKENS = 4096

Doubles = npt.NDArray[np.float64]


class Sensitivity(NamedTuple):
    """Sensitivity of the predictions to a layer's outputs; zeros if they do not depend on them.

    Attributes:
        rows: G, the squared gradient of each output, averaged over tokens: float64 [out_features].
        tokens: c, the squared gradient of each token, averaged over outputs and divided by the
            mean over all tokens: float32 [tokens], in the order in which the layer sees them.
            Each expert has means of its own, and its tokens together.
        counts: Number of tokens of each expert; of a linear layer, the number of its tokens.
    """

    rows: Doubles
    tokens: Tensor
    counts: tuple[int, ...] = ()


def measured_batches(blocks: Blocks) -> int:
    """Return the number of batches that gradients are taken on, from the start of the text."""
    return max(1, TOKENS // blocks.inputs[0].shape[:2].numel())


def sensitivities(
    blocks: Blocks,
    tokens: Tensor,
    layers: Collection[str],
    *,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Sensitivity]:
    """Measure the sensitivities of linear layers and of experts.

    The result depends on the seed alone; no global random state is used.

    Args:
        blocks: The dense model, opened with `tokens`. Its `inputs` are read, not changed.
        tokens: The calibration text, int64 [samples, seqlen].
        layers: Paths in the model of the layers, or of parameters of experts.
        seed: Seed of the labels that are drawn.
        say: Gets a line per block.

    Returns:
        The sensitivity of each layer, by path.

    Raises:
        CalibrationError: Predictions or gradients are not finite.
    """
    entered = [blocks.inputs[: measured_batches(blocks)]]
    with torch.no_grad():
        for number in range(len(blocks)):
            block = blocks.load(number)
            entered.append(
                [blocks.run(number, block, h, batch).cpu() for batch, h in enumerate(entered[-1])]
            )
            for hidden in entered[-1]:
                check_states(blocks.path_of(number), hidden)
            blocks.unload(number)
    gradients = _by_final(blocks, tokens, entered.pop(), torch.Generator().manual_seed(seed))
    found: dict[str, Sensitivity] = {}
    for number in reversed(range(len(blocks))):
        say(f"measuring sensitivity: block {number + 1} of {len(blocks)}")
        block, prefix = blocks.load(number), blocks.path_of(number) + "."
        with _squares(block, blocks.weights_of(number, layers)) as squares:
            pairs = zip(entered.pop(), gradients, strict=True)
            gradients = [
                blocks.pull_back(number, block, hidden, gradient, batch).cpu()
                for batch, (hidden, gradient) in enumerate(pairs)
            ]
        blocks.unload(number)
        for name, values in squares.items():
            if not np.isfinite(values.rows).all():
                raise CalibrationError(
                    f"{prefix}{name}: the gradients of its outputs on the calibration text are "
                    f"not all finite; check the model with spallm-convert eval MODEL --text SRC"
                )
            found[prefix + name] = values
    return found


def draw_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a token for every position from the model's prediction.

    Args:
        logits: The model's predictions, [tokens, vocab].
        generator: The random state to draw from, on the CPU.

    Returns:
        The labels, int64 [tokens].
    """
    return torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0]


def _by_final(
    blocks: Blocks, tokens: Tensor, final: list[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """Return the gradients with respect to the hidden states after the last block, by batch.

    Samples go through the head one at a time, because their logits are large.
    """
    batches = []
    with blocks.predicting():
        for batch, hidden in zip(torch.split(tokens, len(final[0])), final, strict=False):
            gradients: list[Tensor] = []
            for ids, states in zip(torch.split(batch, 1), torch.split(hidden, 1), strict=True):
                states.requires_grad_()
                logits = blocks.logits(ids, states).float().flatten(0, 1)
                if not bool(logits.isfinite().all()):
                    raise CalibrationError(
                        "the dense model's predictions on the calibration text are not all finite; "
                        "check the model with spallm-convert eval MODEL --text SRC"
                    )
                labels = draw_labels(logits.detach(), generator).to(logits.device)
                loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
                gradients += torch.autograd.grad(loss, states)
            batches.append(torch.cat(gradients))
    return batches


@contextlib.contextmanager
def _squares(block: nn.Module, targets: Mapping[str, Target]) -> Iterator[dict[str, Sensitivity]]:
    """Yield a dictionary of sensitivities by layer, which is filled when the `with` block ends."""
    sums: dict[str, Tensor] = {}
    calls: dict[str, list[tuple[int, Tensor]]] = {}
    found: dict[str, Sensitivity] = {}

    def noting(name: str) -> Note:
        def note(expert: int, x: Tensor, output: Tensor) -> None:
            place = len(calls[name])  # gradients come from the last call to the first
            calls[name].append((expert, torch.zeros(output[..., 0].numel())))

            def add(gradient: Tensor) -> None:
                squares = gradient.reshape(-1, gradient.shape[-1]).float().square()
                sums[name][expert] += squares.sum(0, dtype=torch.float64)
                calls[name][place] = expert, squares.mean(1).cpu()

            if output.requires_grad:
                output.register_hook(add)  # type: ignore[no-untyped-call]

        return note

    for name, target in targets.items():
        shape = target.weight.experts or 1, target.weight.out_features
        sums[name] = target.rows(block).new_zeros(shape, dtype=torch.float64)
        calls[name] = []
    with watched(block, {name: noting(name) for name in targets}, targets):
        yield found
    for name, total in sums.items():
        found[name] = _sensitivity(total, calls[name])


def _sensitivity(sums: Tensor, calls: list[tuple[int, Tensor]]) -> Sensitivity:
    """Return a sensitivity from sums by expert and output, and the squares of every call."""
    rows, by_expert = [], []
    for expert, total in enumerate(sums):
        own = [squares for number, squares in calls if number == expert]
        tokens = torch.cat([torch.empty(0), *own])
        means = total / max(1, len(tokens))
        mean = float(means.mean())
        rows.append(means)
        by_expert.append(tokens / mean if mean else tokens)
    counts = tuple(map(len, by_expert))
    return Sensitivity(torch.cat(rows).cpu().numpy(), torch.cat(by_expert), counts)
