"""Predict how much every choice of bits and groups for every layer raises the model's loss.

A sample of a layer's rows is sketched with each choice. This works like calibration, but on the
inputs that the layer has in the dense model. The error of each row is weighted by the row's
sensitivity (`sensitivity.py`). The error is measured on other text than the rows are sketched for,
if there is enough text: on the same text, wide layers would look better than they are.
"""

from __future__ import annotations

import itertools
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
)
from spallm_convert.calibration.blocks.targets import Target
from spallm_convert.calibration.blocks.watching import Note, watched
from spallm_convert.calibration.layers import DAMPING, fit_options
from spallm_convert.config import SketchConfig
from spallm_convert.errors import CalibrationError
from spallm_convert.sketch.plan import Plan
from spallm_convert.sketch.widths import Choice, choices
from spallm_convert.source.skeleton import numbers_starred

from .sensitivity import Doubles, Sensitivity, measured_batches

#: Number of rows of a layer that are sketched for its prediction.
SAMPLE_ROWS = 32
#: For experts, it is this many times as large, but not more than once for each of them.
_MORE_ROWS = 4

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
        experts: Number of the expert of each row, int64 [rows]; 0 without experts.
    """

    choices: list[Choice]
    errors: Tensor
    factors: Doubles
    experts: Tensor


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
    measured = dict(enumerate(blocks.inputs[:count]))
    others = {count + number: hidden for number, hidden in enumerate(blocks.inputs[count:])}
    found: list[FusedSet] = []
    for number in range(len(blocks)):
        say(f"predicting losses: block {number + 1} of {len(blocks)}")
        block = blocks.load(number)
        targets = blocks.targets(number, plan.layers.values())
        _check_weights(block, targets)
        costs = {inner: sensitivities[target.path] for inner, target in targets.items()}
        stages = find_stages(blocks, number, block, targets, measured[0])
        trials: dict[str, Trial] = {}
        for some in _at_once(stages, targets):
            sums, after = _sum_inputs(blocks, number, block, some, targets, others or measured)
            for stage in some:
                hessian = sums.pop(stage.names[0])
                check_sums(targets[stage.names[0]].path, hessian)
                trials |= _try(stage, hessian, block, costs, targets, config)
        losses, measured = _measure(blocks, number, block, trials, costs, targets, measured)
        others = after if others else {}
        shapes = {n: (t.weight.rows, t.weight.in_features) for n, t in targets.items()}
        sets = fused([stage.names for stage in stages], shapes)
        found += _by_layer(sets, losses, targets)
        blocks.unload(number)
    return found


def _by_layer(
    sets: list[list[str]], losses: Mapping[str, Losses], targets: Mapping[str, Target]
) -> list[FusedSet]:
    """Return sets of stored weights from sets of parameters, and divide losses by rows.

    Sets that have parts of one stored weight become one set.
    """
    found: list[FusedSet] = []
    for names in sets:
        own = FusedSet({})
        for target, layer, part in ((targets[n], *p) for n in names for p in targets[n].pieces):
            share = part.rows / target.weight.rows
            before = own.losses.get(layer.name, {})
            own.losses[layer.name] = {
                choice: before.get(choice, 0.0) + share * loss
                for choice, loss in losses[target.name].items()
            }
        for other in [other for other in found if other.losses.keys() & own.losses.keys()]:
            found.remove(other)
            for name, values in other.losses.items():
                mine = own.losses.get(name, dict.fromkeys(values, 0.0))
                own.losses[name] = {c: v + mine[c] for c, v in values.items() if c in mine}
        found.append(own)
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
    block: nn.Module,
    costs: Mapping[str, Sensitivity],
    targets: Mapping[str, Target],
    config: SketchConfig,
) -> dict[str, Trial]:
    """Return a trial of each layer of a stage. hessian: X^T X, float64 [n, n].

    For experts, it is the sum over all of them.
    """
    text = config.text_options
    assert text is not None
    how = fit_options(text.without)
    numerics = choose_numerics(hessian.device)
    damped = numerics.prepare_hessian(hessian, DAMPING)
    found = {}
    for inner in stage.names:
        target = targets[inner]
        experts, size = target.weight.experts or 1, target.weight.out_features
        spreads = []
        for expert in range(experts):
            wide = target.rows(block, expert).double()
            centred = wide - wide.mean(1, keepdim=True)
            spreads.append(centred.square() @ hessian.diagonal())
        count = SAMPLE_ROWS * min(experts, _MORE_ROWS)
        rows, factors = draw_rows(costs[inner].rows, torch.cat(spreads).cpu().numpy(), count)
        owners = rows // size
        sample = torch.stack(
            [target.rows(block, int(e))[int(r % size)] for e, r in zip(owners, rows, strict=True)]
        ).float()
        options = choices(target.module, config)
        errors = []
        for choice in options:
            table, codes, _ = numerics.fit(sample, damped, choice.groups, 1 << choice.bits, **how)
            errors.append(numerics.look_up(table, codes) - sample)
        found[inner] = Trial(options, torch.stack(errors), factors, torch.from_numpy(owners))
    return found


def _measure(
    blocks: Blocks,
    number: int,
    block: nn.Module,
    trials: Mapping[str, Trial],
    costs: Mapping[str, Sensitivity],
    targets: Mapping[str, Target],
    hidden: dict[int, Tensor],
) -> tuple[dict[str, Losses], dict[int, Tensor]]:
    """Return the losses of layers by choice, and the block's outputs on the CPU, by batch.

    hidden: Hidden states that enter the block, of the text that sensitivities were measured on.
    """
    lost = {
        n: trial.errors.new_zeros(trial.errors.shape[:2]).double() for n, trial in trials.items()
    }
    seen = {
        name: list(itertools.accumulate((0, *costs[name].counts[:-1])))
        if costs[name].counts
        else [0]
        for name in trials
    }

    def noting(name: str, trial: Trial) -> Note:
        def add(expert: int, x: Tensor, y: Tensor) -> None:
            flat = flat_inputs(x)
            first = seen[name][expert]
            seen[name][expert] = first + len(flat)
            weight = costs[name].tokens[first : first + len(flat)].to(flat)
            own = (trial.experts == expert).nonzero()[:, 0].to(flat.device)
            errors = trial.errors[:, own]
            moved = flat @ errors.flatten(0, 1).T
            lost[name][:, own] += (weight @ moved.square()).view(errors.shape[:2])

        return add

    with watched(block, {name: noting(name, trial) for name, trial in trials.items()}, targets):
        after = _run(blocks, number, block, hidden)
    tokens = sum(states[..., 0].numel() for states in hidden.values())
    found = {}
    for name, trial in trials.items():
        values = lost[name].cpu().numpy() @ trial.factors / (2 * tokens)
        if not np.isfinite(values).all():
            raise CalibrationError(
                f"{targets[name].path}: its predicted losses are not all finite; use "
                f"--bits instead of --target-bits"
            )
        found[name] = dict(zip(trial.choices, values.tolist(), strict=True))
    return found, after


def _run(
    blocks: Blocks, number: int, block: nn.Module, hidden: dict[int, Tensor]
) -> dict[int, Tensor]:
    """Return a block's outputs on the CPU, by batch."""
    return {n: blocks.run(number, block, states, n).cpu() for n, states in hidden.items()}


def _at_once(stages: list[Stage], targets: Mapping[str, Target]) -> Iterator[list[Stage]]:
    """Yield stages whose sums fit into memory together.

    This is one list for a usual block, and several for a block with many experts.
    """
    squares = [targets[stage.names[0]].weight.in_features ** 2 for stage in stages]
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
    targets: Mapping[str, Target],
    hidden: dict[int, Tensor],
) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """Return X^T X over the inputs of stages, and the block's outputs on the CPU, by batch.

    The sums are float64 [in_features, in_features], by the name of each stage's first layer.
    """
    sums: dict[str, Tensor] = {}

    def noting(hessian: Tensor) -> Note:
        def add(expert: int, x: Tensor, y: Tensor) -> None:
            flat = flat_inputs(x)
            hessian.add_(flat.T @ flat)

        return add

    for name in (stage.names[0] for stage in stages):
        columns = targets[name].weight.in_features
        sums[name] = torch.zeros(columns, columns, dtype=torch.float64, device=blocks.device)
    with watched(block, {name: noting(total) for name, total in sums.items()}, targets):
        after = _run(blocks, number, block, hidden)
    return sums, after


def _check_weights(block: nn.Module, targets: Mapping[str, Target]) -> None:
    """Raise CalibrationError if weights are not finite."""
    for target in targets.values():
        for expert in range(target.weight.experts or 1):
            if not bool(target.rows(block, expert).isfinite().all()):
                raise CalibrationError(
                    f"{target.path}: its weights are not all finite; only finite weights can be "
                    f"sketched (--ignore {target.path} leaves the layer dense)"
                )
