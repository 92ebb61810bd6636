"""Sketch a block layer by layer, each on inputs that come from the layers sketched before it.

Linear layers that read the same tensor (query, key and value; gate and up) share the sums over it.
Two streams of hidden states go through the model side by side: one through the dense blocks and one
through the sketched ones.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping
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
)
from spallm_convert.calibration.blocks.stand_ins import StopForward
from spallm_convert.calibration.blocks.targets import Segment, Target
from spallm_convert.calibration.blocks.watching import watched
from spallm_convert.errors import CalibrationError
from spallm_convert.sketch.layer import Layer
from spallm_convert.sketch.limits import Limit
from spallm_formats import SketchMetadata

from .assembling import AssembledLayer, AssembledLayers
from .experts import SeenExperts, sum_expert_inputs
from .layers import LayerInputs, SketchedLayer, prepare_inputs, sketch_layer


@torch.no_grad()
def sketch_block(
    blocks: Blocks,
    number: int,
    targets: Mapping[str, Target],
    streams: Streams,
    metadata: SketchMetadata,
    without: Collection[str] = (),
    limit: Limit | None = None,
    seen: SeenExperts | None = None,
) -> Iterator[AssembledLayer]:
    """Sketch the layers of a block in the order in which the block runs them.

    At the end, `streams` are replaced by the hidden states after the block.

    Args:
        blocks: The dense model.
        number: Number of the block.
        targets: The parameters to sketch, by their names in the block.
        streams: Hidden states that enter the block.
        metadata: Mapping, seed and table dtype.
        without: Steps of `STEPS` to leave out.
        limit: Limit of the dtype that the model loads in.
        seen: The experts of the block are added.

    Yields:
        Every sketched layer, when all its rows are sketched.

    Raises:
        CalibrationError: Weights or inputs are not finite, or tables overflow their stored dtype.
    """
    block = blocks.load(number)
    dense = copy.deepcopy(block)
    stages = find_stages(blocks, number, block, targets, streams.sketched[0])
    made = AssembledLayers()
    is_left = False  # whether the dense stream has left the block
    for stage in stages:
        some = [targets[name] for name in stage.names]
        if some[0].is_experts:
            hidden = streams.sketched
            for sums in sum_expert_inputs(blocks, number, block, some[0], targets, hidden):
                _count(seen, blocks.path_of(number), some[0], sums.expert, sums.tokens)
                inputs = prepare_inputs(sums.hessian, None, without, sums.shrunk)
                for segment in some[0].segments():
                    if segment.expert == sums.expert:
                        layer = _sketch(block, some[0], segment, inputs, metadata, without, limit)
                        yield from made.add(segment, layer)
            continue
        # The last stage runs most of the block anyway, so there the dense block runs to its end.
        is_left = stage is stages[-1]
        pair = _sum_inputs(blocks, number, (dense, block), stage, targets, streams, finish=is_left)
        inputs = prepare_inputs(*pair, without)
        for target in some:
            for segment in target.segments():
                layer = _sketch(block, target, segment, inputs, metadata, without, limit)
                yield from made.add(segment, layer)
    if not is_left:
        _run_through(blocks, number, dense, streams.dense)
    _run_through(blocks, number, block, streams.sketched, sketched=True)
    for hidden_states in (*streams.dense, *streams.sketched):
        check_states(blocks.path_of(number), hidden_states)
    blocks.unload(number)


@torch.no_grad()
def replay_block(
    blocks: Blocks,
    number: int,
    targets: Mapping[str, Target],
    read: Callable[[Layer], np.ndarray[Any, Any]],
    streams: Streams,
) -> None:
    """Run both streams through a block that an earlier run has sketched.

    Args:
        blocks: The dense model.
        number: Number of the block.
        targets: The parameters that are sketched, by their names in the block.
        read: Returns the weights that the sketch of a layer stands for, float32 [rows, columns].
        streams: Hidden states that enter the block. They are replaced by those that leave it.
    """
    block = blocks.load(number)
    _run_through(blocks, number, block, streams.dense)
    found: dict[str, np.ndarray[Any, Any]] = {}
    for target in targets.values():
        for part in target.segments():
            if part.layer.name not in found:
                found[part.layer.name] = read(part.layer)
            weights = found[part.layer.name][part.stored : part.stored + part.rows]
            rows = target.rows(block, part.expert)[part.first : part.first + part.rows]
            rows.copy_(torch.from_numpy(weights))
    _run_through(blocks, number, block, streams.sketched, sketched=True)
    blocks.unload(number)


def _run_through(
    blocks: Blocks,
    number: int,
    block: nn.Module,
    stream: list[Tensor],
    *,
    sketched: bool = False,
) -> None:
    """Replace the hidden states of a stream by those that leave a block."""
    for batch, hidden in enumerate(stream):
        stream[batch] = blocks.run(number, block, hidden, batch, sketched=sketched).cpu()


def _sketch(
    block: nn.Module,
    target: Target,
    segment: Segment,
    inputs: LayerInputs,
    metadata: SketchMetadata,
    without: Collection[str],
    limit: Limit | None,
) -> SketchedLayer:
    """Sketch rows of a parameter, and put the weights that the sketch stands for into the block."""
    view = target.rows(block, segment.expert)[segment.first : segment.first + segment.rows]
    weights = view.float().contiguous()
    where, shape = segment.layer.path, segment.layer.module
    try:
        layer = sketch_layer(
            weights, inputs, shape, metadata, without, limit, segment.stored_of_expert
        )
    except OverflowError as error:
        raise CalibrationError(f"{where} has {error}; use --table-dtype float32") from error
    except ValueError as error:
        raise CalibrationError(
            f"{where} cannot be sketched: {error} (--ignore {where} leaves the layer dense)"
        ) from error
    view.copy_(layer.dense)
    return layer


def _count(seen: SeenExperts | None, block: str, target: Target, expert: int, tokens: int) -> None:
    if seen is not None:
        key = f"{block}.{target.owner}", expert
        seen.seen.add(key)
        if tokens < target.weight.in_features:
            seen.few.add(key)


def _sum_inputs(
    blocks: Blocks,
    number: int,
    modules: tuple[nn.Module, nn.Module],
    stage: Stage,
    targets: Mapping[str, Target],
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
    columns = targets[stage.names[0]].weight.in_features
    hessian, cross = (
        torch.zeros(columns, columns, dtype=torch.float64, device=blocks.device) for _ in range(2)
    )
    dense, block = modules
    for index, (before, hidden) in enumerate(zip(*streams, strict=True)):
        everything = before.shape[:2].numel() * stage.calls
        z, after = _inputs(blocks, number, dense, stage, targets, before, index, finish=finish)
        x, _ = _inputs(blocks, number, block, stage, targets, hidden, index, sketched=True)
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
    targets: Mapping[str, Target],
    hidden: Tensor,
    batch: int,
    *,
    finish: bool = False,
    sketched: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the inputs of a stage's layers, float32 [tokens, in_features], and the block's output.

    Without `finish`, the run may stop after the stage. Then the output is None.
    """
    name = stage.names[0]
    seen = [torch.empty(0, targets[name].weight.in_features, device=blocks.device)]
    after = None

    def note(expert: int, x: Tensor, y: Tensor) -> None:
        seen.append(flat_inputs(x))
        if not finish and len(seen) > stage.calls > 0:
            raise StopForward

    with watched(module, {name: note}, targets), contextlib.suppress(StopForward):
        after = blocks.run(number, module, hidden, batch, sketched=sketched)
    return torch.cat(seen), after
