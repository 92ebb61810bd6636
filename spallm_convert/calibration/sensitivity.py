"""How much a model's predictions depend on each output of each layer.

To second order, an error d of row o of a layer moves the predicted distributions by

    KL(dense || sketched) = 1/2 G_o d H d^T / tokens        nats per token

with H = X^T X over the inputs of the layer, and G_o the mean square of the gradient that the
log-likelihood of labels has by output o, where labels are drawn from the dense model's own
predictions: then the gradients' second moment is the Fisher matrix, which is the divergence's
Hessian. Taking it as G times H is K-FAC (arXiv 1503.05671); positions of the text, rows and layers
are treated as independent, since errors of sketching in different rows are.

One block is in memory at a time: forward through all, then backward through each on its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from spallm_convert.errors import CalibrationError

from .blocks import Blocks

#: Of the text that gradients are taken on, unless one batch has more. The hidden states that enter
#: every block wait for the way back.
TOKENS = 4096

Doubles = npt.NDArray[np.float64]


def sensitivities(
    blocks: Blocks,
    tokens: Tensor,
    layers: Collection[str],
    *,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Doubles]:
    """G of linear layers by their paths in the model: float64 [out_features], zeros for a layer
    that the text does not reach.

    tokens: int64 [samples, seqlen], the calibration text. Deterministic for a seed; no global
    random state is used. Raises CalibrationError for predictions and gradients that are not finite.
    """
    count = max(1, TOKENS // blocks.inputs[0].shape[:2].numel())
    entered = [blocks.inputs[:count]]
    with torch.no_grad():
        for number in range(len(blocks)):
            block = blocks.load(number)
            entered.append([blocks.run(number, block, hidden).cpu() for hidden in entered[-1]])
            blocks.unload(number)
    gradients = _by_final(blocks, tokens, entered.pop(), torch.Generator().manual_seed(seed))
    found: dict[str, Doubles] = {}
    for number in reversed(range(len(blocks))):
        say(f"sensitivity of block {number + 1} of {len(blocks)}")
        block, prefix = blocks.load(number), blocks.path_of(number) + "."
        inside = [path.removeprefix(prefix) for path in layers if path.startswith(prefix)]
        with _mean_squares(block, inside) as squares:
            gradients = [
                blocks.pull_back(number, block, hidden, gradient).cpu()
                for hidden, gradient in zip(entered.pop(), gradients, strict=True)
            ]
        blocks.unload(number)
        for name, values in squares.items():
            if not np.isfinite(values).all():
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
def _mean_squares(block: nn.Module, names: Collection[str]) -> Iterator[dict[str, Doubles]]:
    """Gives a dictionary that is filled when the `with` block ends: for every layer the mean over
    tokens of the squared gradient by its outputs, [out_features]."""
    sums: dict[str, Tensor] = {}
    rows = dict.fromkeys(names, 0)
    found: dict[str, Doubles] = {}

    def watch(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def add(gradient: Tensor) -> None:
            flat = gradient.reshape(-1, gradient.shape[-1])
            sums[name] = sums[name] + flat.double().square().sum(0)
            rows[name] += len(flat)

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)  # type: ignore[no-untyped-call]

        return layer.register_forward_hook(hook)

    with contextlib.ExitStack() as stack:
        for name in names:
            layer = block.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            sums[name] = layer.weight.new_zeros(layer.out_features, dtype=torch.float64)
            stack.callback(watch(name, layer).remove)
        yield found
    for name in names:
        found[name] = (sums[name] / max(1, rows[name])).cpu().numpy()
