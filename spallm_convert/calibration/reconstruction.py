"""Block-wise reconstruction: the tables of a block tuned until its outputs are the dense block's.

The sketched block gets what the sketched blocks before it make of the text, the dense one what the
dense ones do. The error of a token's output is relative to the output: a few tokens have a thousand
times the norm of the others, and the next block normalizes all of them alike.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from spallm_convert.devices import fast_products
from spallm_convert.linear import SketchedLinear

from .blocks import Blocks
from .sketching import Streams
from .tuning import TableTuner, at_random, parted


def reconstruct(
    blocks: Blocks,
    number: int,
    sketches: dict[str, SketchedLinear],
    streams: Streams,
    *,
    seed: int,
) -> tuple[dict[str, Tensor], float, float]:
    """Goes through the text once, a batch a step; lets the streams through the block.

    sketches: by the names of the layers in the block, with float32 tables. Returns tables by those
    names, and the mean relative squared error of outputs, before and after, on batches left out.
    """
    block = blocks.load(number)
    sketched = copy.deepcopy(block)
    for name, layer in sketches.items():
        sketched.set_submodule(name, layer)
    inputs, targets = streams.sketched, _outputs(blocks, number, block, streams.dense)
    trained, held_out = parted(len(targets))

    def error(batch: int) -> Tensor:
        with fast_products(blocks.device):
            found = blocks.run(number, sketched, inputs[batch])
        return _relative_error(found.float(), targets[batch].to(found.device))

    @torch.no_grad()
    def measured() -> float:
        return sum(error(batch).item() for batch in held_out) / len(held_out)

    before = measured()
    if before > 0:
        tuner = TableTuner(sketched, len(trained), before)
        for batch, _ in zip(at_random(trained, seed), trained, strict=False):
            tuner.step(error(batch) / before)
        tuner.offer(measured())
        tables, after = tuner.put_best(), tuner.least
    else:
        tables, after = {name: layer.weight_table.data for name, layer in sketches.items()}, before
    streams.dense[:] = targets
    streams.sketched[:] = _outputs(blocks, number, sketched, inputs)
    blocks.unload(number)
    return tables, before, after


@torch.no_grad()
def _outputs(blocks: Blocks, number: int, block: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Float32 on the CPU, by batch."""
    found = []
    for hidden in inputs:
        with fast_products(blocks.device):
            output = blocks.run(number, block, hidden)
        found.append(output.float().cpu())
    return found


def _relative_error(found: Tensor, target: Tensor) -> Tensor:
    squares = target.square().sum(-1)
    tiny = torch.finfo(squares.dtype).tiny
    return ((found - target).square().sum(-1) / squares.clamp(min=tiny)).mean()
