"""How much a model's predictions depend on the outputs of each layer.

To second order, an error d of row o of a layer moves the predicted distributions by

    KL(dense || sketched) = 1/2 mean over t of g_to^2 (x_t d^T)^2        nats per token

with x_t the layer's input at position t and g_to the gradient that the log-likelihood of labels has
by output o there, where labels are drawn from the dense model's own predictions: then the
gradients' second moment is the Fisher matrix, which is the divergence's Hessian. Rows, positions
and layers are treated as independent, since errors of sketching in different rows are.

Of g_to^2 the means by row and by token are kept, which make g_to^2 = c_t G_o of it. K-FAC (arXiv
1503.05671) takes c_t as 1, as if much depended on the very tokens whose inputs are large.

One block is in memory at a time: forward through all, then backward through each on its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.errors import CalibrationError

#: Of the text that gradients are taken on, unless one batch has more. The hidden states that enter
#: every block wait for the way back.
TOKENS = 4096

Doubles = npt.NDArray[np.float64]


class Sensitivity(NamedTuple):
    """Of a layer. rows: G, the mean over tokens of the squared gradient by each output, float64
    [out_features]; tokens: c, its mean over outputs by token, as a multiple of the mean of all,
    float32 [tokens] in the order in which the layer sees them. Zeros where nothing depends on it.
    """

    rows: Doubles
    tokens: Tensor


def measured_batches(blocks: Blocks) -> int:
    """How many batches of a text gradients are taken on, its first."""
    return max(1, TOKENS // blocks.inputs[0].shape[:2].numel())


def sensitivities(
    blocks: Blocks,
    tokens: Tensor,
    layers: Collection[str],
    *,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Sensitivity]:
    """Those of linear layers by their paths in the model.

    tokens: int64 [samples, seqlen], the calibration text. Deterministic for a seed; no global
    random state is used. Raises CalibrationError for predictions and gradients that are not finite.
    """
    entered = [blocks.inputs[: measured_batches(blocks)]]
    with torch.no_grad():
        for number in range(len(blocks)):
            block = blocks.load(number)
            entered.append([blocks.run(number, block, hidden).cpu() for hidden in entered[-1]])
            blocks.unload(number)
    gradients = _by_final(blocks, tokens, entered.pop(), torch.Generator().manual_seed(seed))
    found: dict[str, Sensitivity] = {}
    for number in reversed(range(len(blocks))):
        say(f"sensitivity of block {number + 1} of {len(blocks)}")
        block, prefix = blocks.load(number), blocks.path_of(number) + "."
        inside = [path.removeprefix(prefix) for path in layers if path.startswith(prefix)]
        with _squares(block, inside) as squares:
            gradients = [
                blocks.pull_back(number, block, hidden, gradient).cpu()
                for hidden, gradient in zip(entered.pop(), gradients, strict=True)
            ]
        blocks.unload(number)
        for name, values in squares.items():
            if not np.isfinite(values.rows).all():
                raise CalibrationError(
                    f"{prefix}{name}: the gradients of its outputs on the calibration text are "
                    f"not all finite"
                )
            found[prefix + name] = values
    return found


def draw_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token for every position as the model predicts it: int64 [tokens] for [tokens, vocab]."""
    return torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0]


def _by_final(
    blocks: Blocks, tokens: Tensor, final: list[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """Gradients by the hidden states after the last block, by batch; a sample at a time, as its
    logits are large."""
    batches = []
    with blocks.predicting():
        for batch, hidden in zip(torch.split(tokens, len(final[0])), final, strict=False):
            gradients: list[Tensor] = []
            for ids, states in zip(torch.split(batch, 1), torch.split(hidden, 1), strict=True):
                states.requires_grad_()
                logits = blocks.logits(ids, states).float().flatten(0, 1)
                if not bool(logits.isfinite().all()):
                    raise CalibrationError(
                        "the dense model's predictions on the calibration text are not all finite"
                    )
                labels = draw_labels(logits.detach(), generator).to(logits.device)
                loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
                gradients += torch.autograd.grad(loss, states)
            batches.append(torch.cat(gradients))
    return batches


@contextlib.contextmanager
def _squares(block: nn.Module, names: Collection[str]) -> Iterator[dict[str, Sensitivity]]:
    """Gives a dictionary that is filled when the `with` block ends, by layer."""
    sums: dict[str, Tensor] = {}
    calls: dict[str, list[Tensor]] = {}
    found: dict[str, Sensitivity] = {}

    def watch(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            place = len(calls[name])  # gradients come in another order than calls
            calls[name].append(torch.zeros(output[..., 0].numel()))

            def add(gradient: Tensor) -> None:
                squares = gradient.reshape(-1, gradient.shape[-1]).float().square()
                sums[name] = sums[name] + squares.sum(0, dtype=torch.float64)
                calls[name][place] = squares.mean(1).cpu()

            if output.requires_grad:
                output.register_hook(add)  # type: ignore[no-untyped-call]

        return layer.register_forward_hook(hook)

    with contextlib.ExitStack() as stack:
        for name in names:
            layer = block.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            sums[name] = layer.weight.new_zeros(layer.out_features, dtype=torch.float64)
            calls[name] = []
            stack.callback(watch(name, layer).remove)
        yield found
    for name in names:
        tokens = torch.cat([torch.empty(0), *calls[name]])
        rows = sums[name] / max(1, len(tokens))
        mean = float(rows.mean())
        found[name] = Sensitivity(rows.cpu().numpy(), tokens / mean if mean else tokens)
