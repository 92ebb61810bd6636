"""Predict how much every choice of bits and groups for every layer raises the model's loss.

A sample of a layer's rows is sketched with each choice. This works like calibration, but on the
inputs that the layer has in the dense model. The error of each row is weighted by the row's
sensitivity (`sensitivity.py`). The error is measured on other text than the rows are sketched for,
if there is enough text: on the same text, wide layers would look better than they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from spallm_convert.calibration.backends import choose_numerics
from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.calibration.blocks.stages import (
    Stage,
    check_sums,
    find_stages,
    flat_inputs,
    on_input,
)
from spallm_convert.calibration.layers import DAMPING, fit_options
from spallm_convert.config import SketchConfig
from spallm_convert.errors import CalibrationError
from spallm_convert.sketch.layer import Layer
from spallm_convert.sketch.plan import Plan
from spallm_convert.sketch.widths import Choice, choices
from spallm_convert.source.skeleton import numbers_starred

from .sensitivity import Doubles, Sensitivity, measured_batches

#: Number of rows of a layer that are sketched for its prediction.
SAMPLE_ROWS = 32

#: Sums over inputs (X^T X) that are in memory at a time, as a multiple of the sum of a block's
#: widest layer. All sums of a block like Llama's take 1.2 to 1.5 times as much as that one.
_AT_ONCE = 2

#: Predicted loss in nats per token, by choice.
Losses = dict[Choice, float]


class FusedSet(NamedTuple):
    """Modules that share bits and groups.

    Attributes:
        losses: The losses of each module, by its name in the checkpoint.
    """

    losses: dict[str, Losses]

    def shared(self) -> Losses:
        """Return the sum of the modules' losses, for the choices that all of them have."""
        first, *others = self.losses.values()
        return {
            choice: loss + sum(other[choice] for other in others)
            for choice, loss in first.items()
            if all(choice in other for other in others)
        }


class Trial(NamedTuple):
    """Some rows of a layer, sketched with every choice.

    Attributes:
        choices: The choices of bits and groups.
        errors: The sketched weights minus the dense ones, float32 [choices, rows, in_features].
        factors: Weights of the rows, float64 [rows]. The weighted sum of the rows' losses estimates
            the loss of the whole layer.
    """

    choices: list[Choice]
    errors: Tensor
    factors: Doubles


@torch.no_grad()
def predict(
    blocks: Blocks,
    plan: Plan,
    config: SketchConfig,
    sensitivities: Mapping[str, Sensitivity],
    *,
    say: Callable[[str], None],
) -> list[FusedSet]:
    """Predict the losses of all modules of a plan, on the text that `blocks` were opened with.

    Args:
        blocks: The dense model. Its `inputs` are read, not changed.
        plan: The modules to sketch.
        config: Options of the conversion, with calibration.
        sensitivities: The sensitivity of each layer, by its path in the model.
        say: Gets a line per block.

    Returns:
        The losses of all modules by choice, in sets that share bits and groups.

    Raises:
        CalibrationError: Inputs or weights are not finite.
    """
    count = measured_batches(blocks)
    measured, others = blocks.inputs[:count], blocks.inputs[count:]
    found = []
    for number in range(len(blocks)):
        say(f"predicting losses: block {number + 1} of {len(blocks)}")
        block = blocks.load(number)
        layers = plan.in_block(blocks.path_of(number))
        weights = {inner: _weights(block, inner, layer.path) for inner, layer in layers.items()}
        costs = {inner: sensitivities[layer.path] for inner, layer in layers.items()}
        stages = find_stages(blocks, number, block, layers, measured[0])
        trials: dict[str, Trial] = {}
        for some in _at_once(stages, layers):
            sums, after = _sum_inputs(blocks, number, block, some, layers, others or measured)
            for stage in some:
                hessian = sums.pop(stage.names[0])
                check_sums(layers[stage.names[0]].path, hessian)
                trials |= _try(stage, hessian, weights, costs, layers, config)
        losses, measured = _measure(blocks, number, block, trials, costs, measured)
        others = after if others else []
        shapes = {inner: layer.weight.shape for inner, layer in layers.items()}
        for together in fused([stage.names for stage in stages], shapes):
            found.append(FusedSet({layers[inner].name: losses[inner] for inner in together}))
        blocks.unload(number)
    return found


def fused(stages: list[list[str]], shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Group the layers of a block into sets that serving engines fuse into one layer.

    Layers that read the same tensor (query, key and value; gate and up) are computed as one matrix
    product. Experts are fused too: layers of one shape whose names differ only in numbers.

    Args:
        stages: Names of the layers in the block, in lists that read the same tensor.
        shapes: Shape of each layer's weight, by name.

    Returns:
        Names of the layers, in sets.
    """

    def kind_of(name: str) -> tuple[str, tuple[int, ...]]:
        return numbers_starred(name), shapes[name]

    kinds: list[set[tuple[str, tuple[int, ...]]]] = []
    for names in stages:
        own = {kind_of(name) for name in names}
        apart = [kind for kind in kinds if not kind & own]
        kinds = [*apart, own.union(*(kind for kind in kinds if kind & own))]
    return [[name for names in stages for name in names if kind_of(name) in kind] for kind in kinds]


def draw_rows(
    shares: Doubles, spreads: Doubles, count: int
) -> tuple[npt.NDArray[np.intp], Doubles]:
    """Choose rows that represent all rows of a layer, and their weights.

    Rows are sorted by their expected cost (share times spread) and taken at even steps of the
    cumulated cost. Nothing is random.

    Args:
        shares: What a unit of a row's error costs, [rows].
        spreads: Values that the rows' errors are about proportional to, [rows].
        count: Number of rows to draw. If there are no more than that, all of them are taken.

    Returns:
        The numbers of the rows and a factor for each. The sum of the rows' errors times their
        factors estimates the cost of all rows.
    """
    if len(shares) <= count:
        return np.arange(len(shares)), shares
    expected = shares * spreads
    order = np.argsort(expected, kind="stable")
    ends = np.cumsum(expected[order])
    marks = (np.arange(count) + 0.5) / count * ends[-1]
    places = np.searchsorted(ends, marks, side="right")
    rows, times = np.unique(order[np.minimum(places, len(order) - 1)], return_counts=True)
    factors = np.zeros(len(rows))
    np.divide(times * ends[-1] / count, spreads[rows], out=factors, where=spreads[rows] > 0)
    return rows, factors


def _try(
    stage: Stage,
    hessian: Tensor,
    weights: Mapping[str, Tensor],
    costs: Mapping[str, Sensitivity],
    layers: Mapping[str, Layer],
    config: SketchConfig,
) -> dict[str, Trial]:
    """Return a trial of each layer of a stage. hessian: X^T X, float64 [n, n]."""
    assert config.calibration is not None
    how = fit_options(config.calibration.without)
    numerics = choose_numerics(hessian.device)
    damped = numerics.prepare_hessian(hessian, DAMPING)
    found = {}
    for inner in stage.names:
        wide = weights[inner].double()
        spreads = (wide - wide.mean(1, keepdim=True)).square() @ hessian.diagonal()
        rows, factors = draw_rows(costs[inner].rows, spreads.cpu().numpy(), SAMPLE_ROWS)
        sample = weights[inner][torch.from_numpy(rows).to(hessian.device)]
        options = choices(layers[inner].module, config)
        errors = []
        for choice in options:
            table, codes, _ = numerics.fit(sample, damped, choice.groups, 1 << choice.bits, **how)
            errors.append(numerics.look_up(table, codes) - sample)
        found[inner] = Trial(options, torch.stack(errors), factors)
    return found


def _measure(
    blocks: Blocks,
    number: int,
    block: nn.Module,
    trials: Mapping[str, Trial],
    costs: Mapping[str, Sensitivity],
    hidden: list[Tensor],
) -> tuple[dict[str, Losses], list[Tensor]]:
    """Return the losses of layers by choice, and the block's outputs on the CPU.

    hidden: Hidden states that enter the block, of the text that sensitivities were measured on.
    """
    lost = {
        n: trial.errors.new_zeros(trial.errors.shape[:2]).double() for n, trial in trials.items()
    }
    seen = dict.fromkeys(trials, 0)
    with contextlib.ExitStack() as stack:
        for name, trial in trials.items():

            def add(x: Tensor, name: str = name, trial: Trial = trial) -> None:
                flat = flat_inputs(x)
                first, seen[name] = seen[name], seen[name] + len(flat)
                weight = costs[name].tokens[first : seen[name]].to(flat)
                moved = flat @ trial.errors.flatten(0, 1).T
                lost[name] += (weight @ moved.square()).view_as(lost[name])

            stack.enter_context(on_input(block, name, add))
        after = [blocks.run(number, block, states).cpu() for states in hidden]
    tokens = sum(states[..., 0].numel() for states in hidden)
    found = {}
    for name, trial in trials.items():
        values = lost[name].cpu().numpy() @ trial.factors / (2 * tokens)
        if not np.isfinite(values).all():
            raise CalibrationError(
                f"{blocks.path_of(number)}.{name}: its predicted losses are not all finite; use "
                f"--bits instead of --target-bits"
            )
        found[name] = dict(zip(trial.choices, values.tolist(), strict=True))
    return found, after


def _at_once(stages: list[Stage], layers: Mapping[str, Layer]) -> Iterator[list[Stage]]:
    """Yield stages whose sums fit into memory together.

    This is one list for a usual block, and several for a block with many experts.
    """
    squares = [layers[stage.names[0]].module.in_features ** 2 for stage in stages]
    some: list[Stage] = []
    held = 0
    for stage, square in zip(stages, squares, strict=True):
        if some and held + square > _AT_ONCE * max(squares):
            yield some
            some, held = [], 0
        some.append(stage)
        held += square
    yield some  # empty if there are no stages: the block must be run all the same


def _sum_inputs(
    blocks: Blocks,
    number: int,
    block: nn.Module,
    stages: list[Stage],
    layers: Mapping[str, Layer],
    hidden: list[Tensor],
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return X^T X over the inputs of stages, and the block's outputs on the CPU.

    The sums are float64 [in_features, in_features], by the name of each stage's first layer.
    """
    sums: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for name in (stage.names[0] for stage in stages):
            columns = layers[name].module.in_features
            sums[name] = torch.zeros(columns, columns, dtype=torch.float64, device=blocks.device)

            def add(x: Tensor, hessian: Tensor = sums[name]) -> None:
                flat = flat_inputs(x)
                hessian += flat.T @ flat

            stack.enter_context(on_input(block, name, add))
        after = [blocks.run(number, block, states).cpu() for states in hidden]
    return sums, after


def _weights(block: nn.Module, name: str, path: str) -> Tensor:
    """Return a layer's weights in float32. Raise CalibrationError if they are not finite."""
    layer = block.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    weights = layer.weight.float()
    if not bool(weights.isfinite().all()):
        raise CalibrationError(
            f"{path}: its weights are not all finite; only finite weights can be sketched "
            f"(--ignore {path} leaves the layer dense)"
        )
    return weights
