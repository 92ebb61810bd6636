"""What a layer may be sketched with under `target_bits`, and what that takes on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from spallm_convert.config import BITS, SketchConfig
from spallm_convert.errors import OptionError
from spallm_formats import SketchedModule
from spallm_kernels.triton.tiles import ALIGNMENT

_SEVERAL_GROUPS = (2, 4)


class Choice(NamedTuple):
    """Bits per code and groups per row of a layer."""

    bits: int
    groups: int


def choices(module: SketchedModule, config: SketchConfig) -> list[Choice]:
    """All that make sense for a layer, those of uniform bits among them.

    Where a row has several groups their tables take less than a bit per weight, which codes one bit
    wider would make more of.
    """
    found = []
    for bits in BITS:
        usual = uniform(module, bits, config)
        found += sorted({Choice(bits, 1), usual, *_several(module, bits, config)})
    return found


def uniform(module: SketchedModule, bits: int, config: SketchConfig) -> Choice:
    """What a layer gets where all layers get the same bits."""
    return Choice(bits, config.groups_for(module.in_features))


def with_choice(module: SketchedModule, choice: Choice) -> SketchedModule:
    """A module with other bits and groups."""
    return replace(module, bits=choice.bits, groups_per_row=choice.groups)


def stored_bits(module: SketchedModule, choice: Choice, config: SketchConfig) -> int:
    """What a module takes on disk: index map with its padding, and tables."""
    specs = with_choice(module, choice).tensors("", config.mapping, config.table_dtype)
    return 8 * sum(spec.nbytes for spec in specs)


def check_target(modules: Mapping[str, SketchedModule], config: SketchConfig) -> None:
    """Raises OptionError for a `target_bits` that no choices for a model's layers meet."""
    if config.target_bits is None:
        return
    sizes = [
        [stored_bits(module, choice, config) for choice in choices(module, config)]
        for module in modules.values()
    ]
    budget_for(sizes, sum(module.weights for module in modules.values()), config.target_bits)


def budget_for(sizes: Sequence[Sequence[int]], weights: int, target: float) -> int:
    """The most bits that are no more than a target per weight.

    sizes: in bits, of all choices of every module, or of every set of them. Raises OptionError for
    a target that none of them meet; those that it names can be typed back.
    """
    least, most = (sum(map(end, sizes)) for end in (min, max))
    budget = math.floor(target * weights) + 1
    while budget / weights > target:  # compared as a target was divided: it may be the least size
        budget -= 1
    if not least <= budget <= most:
        accepted = (
            math.ceil(1000 * least / weights) / 1000,
            math.floor(1000 * most / weights) / 1000,
        )
        raise OptionError(
            f"target_bits {target:g} cannot be met: with its tables this model takes "
            f"{accepted[0]:.3f} to {accepted[1]:.3f} bits per sketched weight"
        )
    return budget


def _several(module: SketchedModule, bits: int, config: SketchConfig) -> list[Choice]:
    found = []
    for groups in _SEVERAL_GROUPS:
        if module.in_features % (groups * ALIGNMENT) == 0:  # others are slow on GPUs
            choice = Choice(bits, groups)
            _, table = with_choice(module, choice).tensors("", config.mapping, config.table_dtype)
            if 8 * table.nbytes < module.weights:
                found.append(choice)
    return found
