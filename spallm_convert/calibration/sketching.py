"""A block sketched on its own inputs: layer by layer, each fed by those before it as they are now.

Linear layers that read the same tensor (query, key and value; gate and up) share its sums. Two
streams of hidden states go through the model side by side, one through the dense blocks and one
through the sketched ones.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.calibration.blocks.stand_ins import Enough
from spallm_convert.errors import CalibrationError
from spallm_formats import SketchedModule, SketchMetadata

from .layers import SketchedLayer, prepare_inputs, sketch_layer


class Streams(NamedTuple):
    """Hidden states [batch, seqlen, hidden] of the text, by batch, in both models.

    They are kept on the CPU, so that what a device holds does not grow with the text. A block is
    run some ten times with all of them, and carrying them there takes a small part of the time that
    its products take.
    """

    dense: list[Tensor]
    sketched: list[Tensor]


@dataclass(frozen=True)
class Stage:
    """Linear layers with the same input: their names in the block, and calls of one per run."""

    names: list[str]
    calls: int


@torch.no_grad()
def sketch_block(
    blocks: Blocks,
    number: int,
    layers: dict[str, SketchedModule],
    streams: Streams,
    metadata: SketchMetadata,
    without: Collection[str] = (),
) -> Iterator[tuple[str, SketchedLayer]]:
    """Sketches layers of a block in the order in which it runs them; updates `streams` at the end.

    layers: by their names in the block. Raises CalibrationError when weights or inputs are not
    finite, or tables are not in their stored dtype.
    """
    block = blocks.load(number)
    dense = copy.deepcopy(block)
    stages = find_stages(blocks, number, block, layers, streams.sketched[0])
    for stage in stages:
        columns = layers[stage.names[0]].in_features
        # Most of a block is run for its last stage: the dense one is let finish.
        finish = stage is stages[-1]
        sums = _sum_inputs(blocks, number, (dense, block), stage, columns, streams, finish=finish)
        inputs = prepare_inputs(*sums, without)
        for name in stage.names:
            linear: Any = block.get_submodule(name)
            weights = linear.weight.float()
            where = f"{blocks.path_of(number)}.{name}"
            try:
                layer = sketch_layer(weights, inputs, layers[name], metadata, without)
            except OverflowError as error:
                remedy = "use --table-dtype float32"
                raise CalibrationError(f"{where} has {error}; {remedy}") from error
            except ValueError as error:
                raise CalibrationError(
                    f"{where} cannot be sketched: {error} (--ignore leaves the layer dense)"
                ) from error
            linear.weight.copy_(layer.dense)
            yield name, layer
    through = [(streams.sketched, block)] + ([] if stages else [(streams.dense, dense)])
    for stream, module in through:
        for index, hidden in enumerate(stream):
            stream[index] = blocks.run(number, module, hidden).cpu()
    blocks.unload(number)


@torch.no_grad()
def replay_block(
    blocks: Blocks, number: int, weights: dict[str, np.ndarray[Any, Any]], streams: Streams
) -> None:
    """Lets the streams through a block that has been sketched before, float32 weights by name."""
    block = blocks.load(number)
    for index, hidden in enumerate(streams.dense):
        streams.dense[index] = blocks.run(number, block, hidden).cpu()
    for name, dense in weights.items():
        linear: Any = block.get_submodule(name)
        linear.weight.copy_(torch.from_numpy(dense))
    for index, hidden in enumerate(streams.sketched):
        streams.sketched[index] = blocks.run(number, block, hidden).cpu()
    blocks.unload(number)


def find_stages(
    blocks: Blocks,
    number: int,
    block: nn.Module,
    layers: Collection[str],
    hidden: Tensor,
) -> list[Stage]:
    """Layers in order of their first call, those that read the same tensor together; at the end
    layers that are not called, such as experts that no token chose here: they may be elsewhere."""
    seen: list[tuple[str, Tensor]] = []
    with contextlib.ExitStack() as stack:
        for name in layers:
            stack.enter_context(on_input(block, name, lambda x, name=name: seen.append((name, x))))
        blocks.run(number, block, hidden)
    stages: list[tuple[Tensor | None, Stage]] = []
    for name, x in seen:
        calls = sum(other == name for other, _ in seen)
        if any(name in stage.names for _, stage in stages):
            continue
        if calls == 1 and stages and stages[-1][0] is x:
            stages[-1][1].names.append(name)
        else:
            stages.append((x if calls == 1 else None, Stage([name], calls)))
    idle = [Stage([name], 0) for name in layers if all(name != other for other, _ in seen)]
    return [stage for _, stage in stages] + idle


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
    """X^T X and X^T Z, float64 [columns, columns], over the inputs of a stage: X in the block that
    is being sketched, Z in the dense one. Products of a batch are float32, their sum is float64.

    finish: whether the dense stream goes on to what leaves the block."""
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
        # Experts may get other tokens in the two models, as many or not: rows of x and z are of the
        # same tokens for sure only where a layer gets all of them. Else nothing is made up for.
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
    """The inputs of a stage's layers for some hidden states, float32 [tokens, in_features]; and
    what leaves the block, if it is run to its end, which `finish` asks for."""
    seen = [torch.empty(0, columns, device=blocks.device)]
    after = None

    def note(x: Tensor) -> None:
        seen.append(flat_inputs(x))
        if not finish and len(seen) > stage.calls > 0:
            raise Enough

    with on_input(module, stage.names[0], note), contextlib.suppress(Enough):
        after = blocks.run(number, module, hidden)
    return torch.cat(seen), after


def flat_inputs(x: Tensor) -> Tensor:
    """Inputs of a layer, float32 [tokens, in_features]."""
    return x.reshape(-1, x.shape[-1]).float()


def check_sums(where: str, *sums: Tensor) -> None:
    """Raises CalibrationError when sums over the inputs of the layer `where` are not finite."""
    if not all(bool(total.isfinite().all()) for total in sums):
        raise CalibrationError(f"{where}: its inputs on the calibration text are not all finite")


@contextlib.contextmanager
def on_input(block: nn.Module, name: str, note: Any) -> Iterator[None]:
    """Has `note` called with the input of a layer whenever the layer is run."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        note(args[0])

    handle = block.get_submodule(name).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
