"""Hidden states between blocks, and a block's linear layers grouped by the tensor they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from spallm_convert.errors import CalibrationError

from .blocks import Blocks
from .targets import Target
from .watching import Note, watched


class Streams(NamedTuple):
    """Hidden states [batch, seqlen, hidden] of the text, by batch, in both models.

    They stay on the CPU, so that a device's memory use does not grow with the text. A block is run
    about ten times on all of them. Copying them to the device takes a small part of the time that
    the block's matrix products take.

    Attributes:
        dense: Hidden states in the dense model.
        sketched: Hidden states in the model whose blocks are sketched up to here.
    """

    dense: list[Tensor]
    sketched: list[Tensor]


@dataclass(frozen=True)
class Stage:
    """Linear layers with the same input.

    Attributes:
        names: Names of the layers in the block, or of one parameter of experts.
        calls: Number of times that a run of the block calls each layer, 0 for experts.
    """

    names: list[str]
    calls: int


def find_stages(
    blocks: Blocks,
    number: int,
    block: nn.Module,
    targets: Mapping[str, Target],
    hidden: Tensor,
) -> list[Stage]:
    """Group a block's layers by the tensor that they read, in the order of their first call.

    Layers that are called several times get a stage of their own, and so does each parameter of
    experts. Layers that are not called come last, each on its own: experts that no token of this
    batch chose may be called in another batch.

    Args:
        blocks: The blocks of the model.
        number: Number of the block.
        block: The block, loaded.
        targets: The layers to sketch, by name in the block.
        hidden: Hidden states of the first batch that enter the block.
    """
    seen: list[tuple[str, Tensor]] = []

    def noting(name: str) -> Note:
        return lambda _, x, __: seen.append((name, x))

    with watched(block, {name: noting(name) for name in targets}, targets):
        blocks.run(number, block, hidden)
    stages: list[tuple[Tensor | None, Stage]] = []
    for name, x in seen:
        calls = sum(other == name for other, _ in seen)
        if any(name in stage.names for _, stage in stages):
            continue
        if targets[name].is_experts:
            stages.append((None, Stage([name], 0)))
        elif calls == 1 and stages and stages[-1][0] is x:
            stages[-1][1].names.append(name)
        else:
            stages.append((x if calls == 1 else None, Stage([name], calls)))
    idle = [Stage([name], 0) for name in targets if all(name != other for other, _ in seen)]
    return [stage for _, stage in stages] + idle


def flat_inputs(x: Tensor) -> Tensor:
    """Reshape the inputs of a layer to float32 [tokens, in_features]."""
    return x.reshape(-1, x.shape[-1]).float()


def check_sums(where: str, *sums: Tensor) -> None:
    """Check sums over the inputs of a layer.

    Args:
        where: Path of the layer in the model.
        sums: Sums over its inputs, such as X^T X.

    Raises:
        CalibrationError: A sum is not finite.
    """
    if not all(bool(total.isfinite().all()) for total in sums):
        raise not_finite(where, "inputs", "calibration")


def check_states(where: str, states: Tensor, text: str = "calibration") -> None:
    """Check the hidden states that leave a block.

    Args:
        where: Path of the block in the model.
        states: The hidden states.
        text: "calibration" or "healing", the text that they are of.

    Raises:
        CalibrationError: A hidden state is not finite.
    """
    if not bool(states.isfinite().all()):
        raise not_finite(where, "outputs", text)


def not_finite(where: str, values: str, text: str) -> CalibrationError:
    """Return the error for values of a module that are not finite, not raised.

    Args:
        where: Path of the module in the model.
        values: "inputs" or "outputs".
        text: "calibration" or "healing", the text that was run through the model.
    """
    return CalibrationError(
        f"{where}: its {values} on the {text} text are not all finite; check the model with "
        f"spallm-convert eval MODEL --text SRC"
    )
