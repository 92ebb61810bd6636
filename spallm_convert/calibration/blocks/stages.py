"""Hidden states between blocks, and the linear layers of a block by the tensor that they read."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from spallm_convert.errors import CalibrationError

from .blocks import Blocks


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


def flat_inputs(x: Tensor) -> Tensor:
    """Inputs of a layer, float32 [tokens, in_features]."""
    return x.reshape(-1, x.shape[-1]).float()


def check_sums(where: str, *sums: Tensor) -> None:
    """Raises CalibrationError when sums over the inputs of the layer `where` are not finite."""
    if not all(bool(total.isfinite().all()) for total in sums):
        raise CalibrationError(f"{where}: its inputs on the calibration text are not all finite")
