"""Choose bits and groups for every layer: the smallest predicted loss within a size.

Each fused set of layers takes one choice of bits and groups. Every choice has a size and a
predicted loss, and the sizes together must fit into the budget. This is a multiple-choice knapsack
problem, a small integer program that HiGHS solves exactly.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.calibration.store import is_finite, sound_files, write_sound
from spallm_convert.config import SketchConfig
from spallm_convert.errors import CalibrationError
from spallm_convert.progress import Progress
from spallm_convert.recipe import BITS
from spallm_convert.sketch.plan import Plan
from spallm_convert.sketch.widths import Choice, budget_for, stored_bits, uniform
from spallm_convert.sketch.widths import choices as all_choices
from spallm_formats import FormatError, read_json, to_json

from .prediction import FusedSet, predict
from .sensitivity import sensitivities

_NAME = "allocation"


@dataclass(frozen=True)
class Allocation:
    """The bits and groups chosen for every module, and the loss they are predicted to cost.

    Attributes:
        choices: The choice for every module, by its name in the checkpoint.
        predicted_loss: KL(dense || sketched) in nats per token, with the choices made ("chosen")
            and if all modules got "2", "3" or "4" bits.
    """

    choices: dict[str, Choice]
    predicted_loss: dict[str, float]

    def write(self, folder: Path) -> None:
        """Write the allocation to a file in `folder`, in place of an earlier one."""
        write_sound(folder, _NAME, to_json(asdict(self)), ".json")

    @classmethod
    def read(cls, folder: Path, plan: Plan, config: SketchConfig) -> Allocation | None:
        """Return the allocation that `write` wrote, None if there is none or it is damaged.

        Args:
            folder: The folder that it was written to.
            plan: The plan that it was made for.
            config: Options of the conversion.
        """
        path = next(sound_files(folder, _NAME, ".json"), None)
        try:
            kept = None if path is None else read_json(path)
        except FormatError:
            return None
        if not isinstance(kept, dict) or kept.keys() != {"choices", "predicted_loss"}:
            return None
        modules, chosen, losses = plan.metadata.modules, kept["choices"], kept["predicted_loss"]
        if not isinstance(chosen, dict) or chosen.keys() != modules.keys():
            return None
        choices = {
            name: next((c for c in all_choices(module, config) if list(c) == chosen[name]), None)
            for name, module in modules.items()
        }
        found = {name: choice for name, choice in choices.items() if choice is not None}
        if not isinstance(losses, dict) or losses.keys() != {"chosen", *map(str, BITS)}:
            return None
        if len(found) < len(modules) or not all(map(is_finite, losses.values())):
            return None
        return cls(found, losses)


def allocate(
    blocks: Blocks,
    plan: Plan,
    config: SketchConfig,
    tokens: Tensor,
    folder: Path,
    progress: Progress,
    *,
    check: Callable[[], None] = lambda: None,
) -> Allocation:
    """Choose bits and groups for every module of a plan, within `config.target_bits`.

    Args:
        blocks: The dense model, opened with `tokens`.
        plan: The modules to choose for.
        config: Options of the conversion, with `target_bits`.
        tokens: The calibration text, int64 [samples, seqlen].
        folder: The allocation is written here. If an earlier run left one, it is returned as is.
        progress: Gets a line per block.
        check: Called before the allocation is kept. It raises an error if the source has changed.

    Returns:
        The choice for every module, with the predicted losses.

    Raises:
        CalibrationError: Weights, inputs or gradients are not finite, or HiGHS found no allocation.
        OptionError: No choices meet the target.
    """
    kept = Allocation.read(folder, plan, config)
    if kept is not None:
        return kept
    layers = plan.layers.values()
    by_block = (blocks.targets(number, layers) for number in range(len(blocks)))
    paths = {target.path for targets in by_block for target in targets.values()}
    costs = sensitivities(blocks, tokens, paths, seed=config.seed, say=progress.say)
    sets = predict(blocks, plan, config, costs, say=progress.say)
    chosen = choose(sets, plan, config)
    check()
    chosen.write(folder)
    return chosen


def choose(sets: Sequence[FusedSet], plan: Plan, config: SketchConfig) -> Allocation:
    """Return the choices with the smallest predicted loss within `config.target_bits`.

    Args:
        sets: The predicted losses of all choices, by fused set.
        plan: The plan that the modules belong to.
        config: Options of the conversion, with `target_bits`.

    Raises:
        CalibrationError: HiGHS found no allocation.
        OptionError: No choices meet the target.
    """
    assert config.target_bits is not None
    modules = plan.metadata.modules
    shared = [fused.shared() for fused in sets]
    sizes = [
        [sum(stored_bits(modules[n], choice, config) for n in fused.losses) for choice in options]
        for fused, options in zip(sets, shared, strict=True)
    ]
    budget = budget_for(sizes, plan.sketched_weights, config.target_bits)
    chosen = solve(sizes, [list(options.values()) for options in shared], budget)
    choices = {
        name: list(options)[number]
        for fused, options, number in zip(sets, shared, chosen, strict=True)
        for name in fused.losses
    }
    plans = {"chosen": {name: choices[name] for name in modules}}
    for bits in BITS:
        plans[str(bits)] = {n: uniform(module, bits, config) for n, module in modules.items()}
    alone = {name: losses for fused in sets for name, losses in fused.losses.items()}
    predicted = {
        name: math.fsum(alone[module][choice] for module, choice in by_module.items())
        for name, by_module in plans.items()
    }
    return Allocation(plans["chosen"], predicted)


def solve(
    sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """Choose one option for each set: the smallest sum of losses with sizes of at most `budget`.

    Args:
        sizes: For every set, the size of each option in bits.
        losses: For every set, the loss of each option.
        budget: The largest sum of sizes, in bits.

    Returns:
        The number of the chosen option, by set.

    Raises:
        CalibrationError: HiGHS found no allocation.
        ValueError: The smallest options do not fit into the budget.
    """
    if sum(map(min, sizes)) > budget:
        needed = sum(map(min, sizes))
        raise ValueError(f"the smallest options need {needed} bits, the budget is {budget}")
    ends = np.cumsum([0, *map(len, sizes)])
    ones = np.ones(ends[-1])
    one_each = csr_array((ones, np.arange(ends[-1]), ends))
    # HiGHS has absolute tolerances of 1e-6. So sizes are divided by their greatest common divisor,
    # and losses are scaled until the largest is a million.
    unit = math.gcd(*(size for of_set in sizes for size in of_set))
    units = np.concatenate(sizes)[None] // unit
    costs = np.concatenate(losses)
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(units, ub=budget // unit)]
    with _silent_stdout():
        result = milp(
            costs * (1e6 / (costs.max() or 1.0)),
            integrality=ones,
            bounds=Bounds(0, 1),
            constraints=limits,
            options={"mip_rel_gap": 0},
        )
    if result.x is None:
        raise CalibrationError(
            f"target_bits: HiGHS found no allocation ({result.message}); use --bits instead of "
            f"--target-bits"
        )
    places = itertools.pairwise(ends)
    chosen = [int(np.argmax(result.x[first:end])) for first, end in places]
    return fit_into(budget, chosen, sizes, losses)


def fit_into(
    budget: int,
    chosen: Sequence[int],
    sizes: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
) -> list[int]:
    """Take smaller options until the sizes fit into the budget.

    HiGHS may go over the budget by its tolerance, so there is little to take back. Each step
    changes one set to a smaller option. It picks the one that adds the least loss per bit, counting
    only saved bits that are still needed.

    Args:
        budget: The largest sum of sizes, in bits. The smallest options must fit into it.
        chosen: The number of the chosen option, by set.
        sizes: For every set, the size of each option in bits.
        losses: For every set, the loss of each option.

    Returns:
        The number of the chosen option, by set.
    """
    found = list(chosen)
    while (over := sum(of_set[n] for of_set, n in zip(sizes, found, strict=True)) - budget) > 0:
        _, number, other = min(
            ((losses[number][other] - losses[number][now]) / min(over, saved), number, other)
            for number, now in enumerate(found)
            for other, size in enumerate(sizes[number])
            if (saved := sizes[number][now] - size) > 0
        )
        found[number] = other
    return found


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """Discard what C code prints to stdout.

    HiGHS 1.12 prints a line of debugging output, which would break JSON that a caller reads from
    stdout. Do nothing if stdout is closed or the system is not POSIX, where C's buffers cannot be
    flushed.
    """
    try:
        kept = os.dup(1) if os.name == "posix" else None
    except OSError:  # it is closed
        kept = None
    if kept is None:
        yield
        return
    flush = ctypes.CDLL(None).fflush
    if sys.stdout is not None:
        sys.stdout.flush()
    flush(None)
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
