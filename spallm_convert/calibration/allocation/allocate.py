"""Bits where they matter: the least predicted loss for a size, solved exactly.

Each fused set of layers takes one of its choices, each with a size and a loss; sizes have to fit
into the budget. That is a multiple-choice knapsack, a small integer programme for HiGHS.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.calibration.store import sound_files, write_sound
from spallm_convert.config import BITS, SketchConfig
from spallm_convert.errors import CalibrationError
from spallm_convert.progress import Progress
from spallm_convert.sketch.plan import Plan
from spallm_convert.sketch.widths import Choice, budget_for, stored_bits, uniform
from spallm_formats import load_json, to_json

from .prediction import FusedSet, predict
from .sensitivity import sensitivities

_NAME = "allocation"


@dataclass(frozen=True)
class Allocation:
    """choices: of every module by its name in the checkpoint; predicted_loss: nats per token of
    KL(dense || sketched) with them ("chosen"), and were all modules given "2", "3" or "4" bits."""

    choices: dict[str, Choice]
    predicted_loss: dict[str, float]

    def write(self, folder: Path) -> None:
        write_sound(folder, _NAME, to_json(asdict(self)), ".json")

    @classmethod
    def read(cls, folder: Path) -> Allocation | None:
        """The reverse of `write`; None where nothing is, or it is damaged."""
        path = next(sound_files(folder, _NAME, ".json"), None)
        if path is None:
            return None
        kept = load_json(path.read_bytes(), path.name)
        choices = {name: Choice(*choice) for name, choice in kept["choices"].items()}
        return cls(choices, kept["predicted_loss"])


def allocate(
    blocks: Blocks,
    plan: Plan,
    config: SketchConfig,
    tokens: Tensor,
    folder: Path,
    progress: Progress,
) -> Allocation:
    """What every module of a plan gets under `config.target_bits`; kept in `folder`, and taken from
    there by a later run.

    tokens: int64 [samples, seqlen], those that `blocks` were opened with. Raises CalibrationError
    for weights, inputs or gradients that are not finite.
    """
    kept = Allocation.read(folder)
    if kept is not None:
        return kept
    costs = sensitivities(blocks, tokens, plan.by_path, seed=config.seed, say=progress.say)
    sets = predict(blocks, plan, config, costs, say=progress.say)
    chosen = choose(sets, plan, config)
    chosen.write(folder)
    return chosen


def choose(sets: Sequence[FusedSet], plan: Plan, config: SketchConfig) -> Allocation:
    """The best choices within `config.target_bits` for predicted losses.

    Raises OptionError when no choices meet it.
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
    """Which of its choices each set takes: the least sum of losses with sizes of at most `budget`.

    sizes, losses: of every set, as long as it has choices. Raises ValueError when the smallest
    choices do not fit, CalibrationError when HiGHS finds nothing.
    """
    if sum(map(min, sizes)) > budget:
        raise ValueError(f"the least size is {sum(map(min, sizes))}, the budget {budget}")
    ends = np.cumsum([0, *map(len, sizes)])
    ones = np.ones(ends[-1])
    one_each = csr_array((ones, np.arange(ends[-1]), ends))
    # HiGHS has absolute tolerances of 1e-6: sizes are counted in their common unit, and losses
    # such that the greatest is a million.
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
        raise CalibrationError(f"HiGHS found no allocation for target_bits: {result.message}")
    places = itertools.pairwise(ends)
    chosen = [int(np.argmax(result.x[first:end])) for first, end in places]
    return fit_into(budget, chosen, sizes, losses)


def fit_into(
    budget: int,
    chosen: Sequence[int],
    sizes: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
) -> list[int]:
    """Choices made smaller until they fit, as little as HiGHS's tolerance was over the budget.

    Each time a set changes to the choice that costs the least loss for what it is too much by. The
    smallest choices have to fit.
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
    """Throws away what C code prints: HiGHS 1.12 has a line of debugging left in, which a caller
    that reads JSON from stdout would find there. Only where C's buffers can be reached."""
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
