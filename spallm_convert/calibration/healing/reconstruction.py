"""Block-wise reconstruction: tune the tables of a block towards the outputs of the dense block.

The sketched block gets the outputs of the sketched blocks before it. The dense block gets the
outputs of the dense ones. The error of a token's output is relative to the output: a few tokens
have a thousand times the norm of the others, and the next block normalizes all of them alike.
"""

from __future__ import annotations

import copy
import math
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.calibration.blocks.replacing import Replace
from spallm_convert.calibration.blocks.stages import Streams, check_states, not_finite
from spallm_convert.devices import fast_products

from .tuning import TableTuner, shuffled_forever, split_batches


class Reconstructed(NamedTuple):
    """The result of reconstructing a block.

    Attributes:
        tables: The best tables by path in the model, float32 [out_features, groups, 2^bits].
        before: Mean relative squared error of outputs on held-out batches, before training.
        after: The same with the best tables.
    """

    tables: dict[str, Tensor]
    before: float
    after: float


def reconstruct(
    blocks: Blocks,
    number: int,
    replace: Replace,
    streams: Streams,
    *,
    dtype: torch.dtype,
    seed: int,
) -> Reconstructed:
    """Tune the tables of a block, then run the block on both streams.

    Training goes through the text once, one batch per step.

    Args:
        blocks: The dense model.
        number: Number of the block.
        replace: Returns the sketched layers, with float32 tables.
        streams: Hidden states that enter the block. They are replaced by those that leave it.
        dtype: The dtype that tables are stored in.
        seed: Seed of the order of batches.

    Returns:
        The tables with the smallest error on the held-out batches.

    Raises:
        CalibrationError: Outputs are not finite, or no gradient is.
    """
    block = blocks.load(number)
    sketched = copy.deepcopy(block)
    path = blocks.path_of(number)
    layers = blocks.replace_layers(number, sketched, replace)
    _let_through(blocks, number, block, streams.dense)
    targets, inputs = streams.dense, streams.sketched
    trained, held_out = split_batches(len(targets))

    def error(batch: int) -> Tensor:
        with fast_products(blocks.device):
            found = blocks.run(number, sketched, inputs[batch], batch)
        return _relative_error(found.float(), targets[batch].to(found.device))

    @torch.no_grad()
    def measured() -> float:
        return sum(error(batch).item() for batch in held_out) / len(held_out)

    before = after = measured()
    if not math.isfinite(before):
        raise not_finite(path, "outputs", "healing")
    start = path + "."
    tables = {n.removeprefix(start): x.weight_table.detach() for n, x in layers.items()}
    if tables and before > 0:
        tuner = TableTuner(sketched, len(trained), before, dtype)
        for batch in islice(shuffled_forever(trained, seed), len(trained)):
            tuner.step(error(batch) / before)
        tuner.check_steps(path)
        with tuner.as_stored():
            tuner.offer(measured())
        tables, after = tuner.put_best(), tuner.least
    _let_through(blocks, number, sketched, streams.sketched)
    blocks.unload(number)
    return Reconstructed({start + n: table for n, table in tables.items()}, before, after)


@torch.no_grad()
def _let_through(blocks: Blocks, number: int, block: nn.Module, stream: list[Tensor]) -> None:
    """Replace the hidden states of a stream by the block's outputs, in float32."""
    for index, hidden in enumerate(stream):
        with fast_products(blocks.device):
            stream[index] = blocks.run(number, block, hidden, index).float().cpu()
        check_states(blocks.path_of(number), stream[index], "healing")


def _relative_error(found: Tensor, target: Tensor) -> Tensor:
    """Return the squared error relative to the target's squared norm, averaged over tokens."""
    squares = target.square().sum(-1)
    tiny = torch.finfo(squares.dtype).tiny
    return ((found - target).square().sum(-1) / squares.clamp(min=tiny)).mean()
