"""What every choice for every layer is predicted to cost in the model's loss.

A sample of a layer's rows is sketched with each choice, as calibration will do it but for the dense
model's inputs, and what they lose counts as much as `sensitivity` says. That is measured on other
text than they are sketched for, if there is: on the same text wide layers would look better than
they are.
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

#: Rows of a layer that are sketched for its prediction.
SAMPLE_ROWS = 32

#: Sums over inputs that are in memory at a time, as values of those of a block's widest layer: a
#: block like Llama's has 1.2 to 1.5 of that in all.
_AT_ONCE = 2

#: Nats per token by choice.
Losses = dict[Choice, float]


class FusedSet(NamedTuple):
    """Modules that share bits and groups: the losses of each by its name in the checkpoint."""

    losses: dict[str, Losses]

    def shared(self) -> Losses:
        """The loss of all modules together, by the choices that all of them have."""
        first, *others = self.losses.values()
        return {
            choice: loss + sum(other[choice] for other in others)
            for choice, loss in first.items()
            if all(choice in other for other in others)
        }


class Trial(NamedTuple):
    """Some rows of a layer sketched in every way. errors: what that changes in their weights,
    float32 [choices, rows, in_features]; factors: [rows], what makes their losses those of all."""

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
    """The predicted losses of all modules of a plan, on the text that `blocks` were opened with.

    sensitivities: by path in the model. Raises CalibrationError for inputs or weights that are not
    finite.
    """
    count = measured_batches(blocks)
    measured, others = blocks.inputs[:count], blocks.inputs[count:]
    found = []
    for number in range(len(blocks)):
        say(f"bits: block {number + 1} of {len(blocks)}")
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
    """Layers of a block in sets that serving engines make one layer of.

    stages: names of layers that read the same tensor (query, key and value; gate and up), and so
    are one product. Experts are one too: layers of one shape whose names differ in numbers alone.
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
    """Rows that stand for all, and the factors that make their losses those of all.

    shares: cost per loss of each row; spreads: what their losses are about proportional to. Rows
    are drawn at even steps of what they are expected to cost, which takes no chance.
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
    """Trials of the layers of a stage. hessian: float64 [in_features, in_features], X^T X."""
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
    """The losses of layers by choice, on hidden states that enter their block and that gradients
    were taken on; and what leaves it, on the CPU."""
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
        found[name] = dict(zip(trial.choices, values.tolist(), strict=True))
    return found, after


def _at_once(stages: list[Stage], layers: Mapping[str, Layer]) -> Iterator[list[Stage]]:
    """Stages whose sums are in memory together: all of a usual block, some of many experts."""
    squares = [layers[stage.names[0]].module.in_features ** 2 for stage in stages]
    some: list[Stage] = []
    held = 0
    for stage, square in zip(stages, squares, strict=True):
        if some and held + square > _AT_ONCE * max(squares):
            yield some
            some, held = [], 0
        some.append(stage)
        held += square
    yield some  # if there are none, for the run alone


def _sum_inputs(
    blocks: Blocks,
    number: int,
    block: nn.Module,
    stages: list[Stage],
    layers: Mapping[str, Layer],
    hidden: list[Tensor],
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """X^T X over the inputs of stages, float64 [in_features, in_features] by the first layer of
    each, and what leaves the block, on the CPU."""
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
    layer = block.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    weights = layer.weight.float()
    if not bool(weights.isfinite().all()):
        raise CalibrationError(
            f"{path} cannot be sketched: its weights are not all finite (--ignore leaves "
            f"the layer dense)"
        )
    return weights
