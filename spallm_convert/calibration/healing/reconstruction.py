"""Block-wise reconstruction: the tables of a block tuned until its outputs are the dense block's.

The sketched block gets what the sketched blocks before it make of the text, the dense one what the
dense ones do. The error of a token's output is relative to the output: a few tokens have a thousand
times the norm of the others, and the next block normalizes all of them alike.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.calibration.blocks.stages import Streams
from spallm_convert.devices import fast_products
from spallm_convert.errors import CalibrationError
from spallm_convert.runtime.linear import SketchedLinear

from .tuning import TableTuner, shuffled_forever, split_batches

#: Gives the sketched layer for a path in the model and its dense layer; None to leave that.
Replace = Callable[[str, nn.Linear], SketchedLinear | None]


class Reconstructed(NamedTuple):
    """tables: float32 [out_features, groups, 2^bits] by path in the model, as they are stored;
    before, after: mean relative squared error of outputs on batches that were not trained on."""

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
    """Tunes a block, going through the text once, a batch a step; lets the streams through it.

    replace: its layers have float32 tables; dtype: that these are stored in. Raises
    CalibrationError for outputs that are not finite.
    """
    block = blocks.load(number)
    sketched = copy.deepcopy(block)
    path = blocks.path_of(number)
    layers = _replace_layers(sketched, path, replace)
    _let_through(blocks, number, block, streams.dense)
    targets, inputs = streams.dense, streams.sketched
    trained, held_out = split_batches(len(targets))

    def error(batch: int) -> Tensor:
        with fast_products(blocks.device):
            found = blocks.run(number, sketched, inputs[batch])
        return _relative_error(found.float(), targets[batch].to(found.device))

    @torch.no_grad()
    def measured() -> float:
        return sum(error(batch).item() for batch in held_out) / len(held_out)

    before = after = measured()
    if not math.isfinite(before):
        raise CalibrationError(f"{path}: its outputs on the text of healing are not all finite")
    tables = {name: layer.weight_table.detach() for name, layer in layers.items()}
    if tables and before > 0:
        tuner = TableTuner(sketched, len(trained), before, dtype)
        for batch in islice(shuffled_forever(trained, seed), len(trained)):
            tuner.step(error(batch) / before)
        with tuner.as_stored():
            tuner.offer(measured())
        tables, after = tuner.put_best(), tuner.least
    _let_through(blocks, number, sketched, streams.sketched)
    blocks.unload(number)
    return Reconstructed({f"{path}.{n}": table for n, table in tables.items()}, before, after)


def _replace_layers(block: nn.Module, path: str, replace: Replace) -> dict[str, SketchedLinear]:
    """Puts sketched layers into a block, and gives them by their names in it."""
    layers = {}
    for name, layer in list(block.named_modules()):
        if isinstance(layer, nn.Linear):
            other = replace(f"{path}.{name}", layer)
            if other is not None:
                block.set_submodule(name, other)
                layers[name] = other
    return layers


@torch.no_grad()
def _let_through(blocks: Blocks, number: int, block: nn.Module, stream: list[Tensor]) -> None:
    """Hidden states, by batch, after a block in the place of those before it; in float32."""
    for index, hidden in enumerate(stream):
        with fast_products(blocks.device):
            stream[index] = blocks.run(number, block, hidden).float().cpu()


def _relative_error(found: Tensor, target: Tensor) -> Tensor:
    squares = target.square().sum(-1)
    tiny = torch.finfo(squares.dtype).tiny
    return ((found - target).square().sum(-1) / squares.clamp(min=tiny)).mean()
