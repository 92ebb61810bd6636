"""Sketch a block layer by layer, each on inputs that come from the layers sketched before it.

Linear layers that read the same tensor (query, key and value; gate and up) share the sums over it.
Two streams of hidden states go through the model side by side: one through the dense blocks and one
through the sketched ones.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.calibration.blocks.stages import (
    Stage,
    Streams,
    check_states,
    check_sums,
    find_stages,
    flat_inputs,
    on_input,
)
from spallm_convert.calibration.blocks.stand_ins import StopForward
from spallm_convert.errors import CalibrationError
from spallm_convert.sketch.layer import Layer
from spallm_convert.sketch.limits import Limit
from spallm_formats import SketchMetadata

from .layers import SketchedLayer, prepare_inputs, sketch_layer


@torch.no_grad()
def sketch_block(
    blocks: Blocks,
    number: int,
    layers: dict[str, Layer],
    streams: Streams,
    metadata: SketchMetadata,
    without: Collection[str] = (),
    limit: Limit | None = None,
) -> Iterator[tuple[str, SketchedLayer]]:
    """Sketch the layers of a block in the order in which the block runs them.

    At the end, `streams` are replaced by the hidden states after the block.

    Args:
        blocks: The dense model.
        number: Number of the block.
        layers: The layers to sketch, by their names in the block.
        streams: Hidden states that enter the block.
        metadata: Mapping, seed and table dtype.
        without: Steps of `STEPS` to leave out.
        limit: Limit of the dtype that the model loads in.

    Yields:
        The name of each layer in the block, and the sketched layer.

    Raises:
        CalibrationError: Weights or inputs are not finite, or tables overflow their stored dtype.
    """
    block = blocks.load(number)
    dense = copy.deepcopy(block)
    stages = find_stages(blocks, number, block, layers, streams.sketched[0])
    for stage in stages:
        columns = layers[stage.names[0]].module.in_features
        # The last stage runs most of the block anyway, so there the dense block runs to its end.
        finish = stage is stages[-1]
        sums = _sum_inputs(blocks, number, (dense, block), stage, columns, streams, finish=finish)
        inputs = prepare_inputs(*sums, without)
        for name in stage.names:
            linear: Any = block.get_submodule(name)
            weights = linear.weight.float()
            where = layers[name].path
            try:
                shape = layers[name].module
                layer = sketch_layer(weights, inputs, shape, metadata, without, limit)
            except OverflowError as error:
                raise CalibrationError(f"{where} has {error}; use --table-dtype float32") from error
            except ValueError as error:
                raise CalibrationError(
                    f"{where} cannot be sketched: {error} (--ignore {where} leaves the layer dense)"
                ) from error
            linear.weight.copy_(layer.dense)
            yield name, layer
    through = [(streams.sketched, block)] + ([] if stages else [(streams.dense, dense)])
    for stream, module in through:
        for index, hidden in enumerate(stream):
            stream[index] = blocks.run(number, module, hidden).cpu()
    for hidden in (*streams.dense, *streams.sketched):
        check_states(blocks.path_of(number), hidden)
    blocks.unload(number)


@torch.no_grad()
def replay_block(
    blocks: Blocks, number: int, weights: dict[str, np.ndarray[Any, Any]], streams: Streams
) -> None:
    """Run both streams through a block that an earlier run has sketched.

    Args:
        blocks: The dense model.
        number: Number of the block.
        weights: The weights that the sketches stand for, float32, by names in the block.
        streams: Hidden states that enter the block. They are replaced by those that leave it.
    """
    block = blocks.load(number)
    for index, hidden in enumerate(streams.dense):
        streams.dense[index] = blocks.run(number, block, hidden).cpu()
    for name, dense in weights.items():
        linear: Any = block.get_submodule(name)
        linear.weight.copy_(torch.from_numpy(dense))
    for index, hidden in enumerate(streams.sketched):
        streams.sketched[index] = blocks.run(number, block, hidden).cpu()
    blocks.unload(number)


def _sum_inputs(
    blocks: Blocks,
    number: int,
    modules: tuple[nn.Module, nn.Module],
    stage: Stage,
    columns: int,
    streams: Streams,
    *,
    finish: bool,
) -> tuple[Tensor, Tensor]:
    """Return X^T X and X^T Z, float64 [columns, columns], over the inputs of a stage.

    X are the inputs in the block that is being sketched, Z those in the dense block. The product of
    a batch is float32, the sum of products is float64.

    modules: the dense block and the one being sketched; finish: whether to run the dense block to
    its end and replace the dense stream by its outputs.
    """
    hessian, cross = (
        torch.zeros(columns, columns, dtype=torch.float64, device=blocks.device) for _ in range(2)
    )
    dense, block = modules
    for index, (before, hidden) in enumerate(zip(*streams, strict=True)):
        everything = before.shape[:2].numel() * stage.calls
        z, after = _inputs(blocks, number, dense, stage, columns, before, finish=finish)
        x, _ = _inputs(blocks, number, block, stage, columns, hidden)
        if finish:
            assert after is not None
            streams.dense[index] = after.cpu()
        product = x.T @ x
        hessian += product
        # An expert may get different tokens in the two models, even if their number is equal. Rows
        # of x and z are surely of the same tokens only if the layer gets all tokens. Otherwise the
        # batch adds no correction.
        cross += x.T @ z if len(x) == len(z) == everything else product
    check_sums(f"{blocks.path_of(number)}.{stage.names[0]}", hessian, cross)
    return hessian, cross


def _inputs(
    blocks: Blocks,
    number: int,
    module: nn.Module,
    stage: Stage,
    columns: int,
    hidden: Tensor,
    *,
    finish: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the inputs of a stage's layers, float32 [tokens, in_features], and the block's output.

    Without `finish`, the run may stop after the stage. Then the output is None.
    """
    seen = [torch.empty(0, columns, device=blocks.device)]
    after = None

    def note(x: Tensor) -> None:
        seen.append(flat_inputs(x))
        if not finish and len(seen) > stage.calls > 0:
            raise StopForward

    with on_input(module, stage.names[0], note), contextlib.suppress(StopForward):
        after = blocks.run(number, module, hidden)
    return torch.cat(seen), after
