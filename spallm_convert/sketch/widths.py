"""List the bits and groups that a layer can get with `target_bits`, and their sizes on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from spallm_convert.config import SketchConfig
from spallm_convert.errors import OptionError
from spallm_convert.recipe import BITS
from spallm_formats import SketchedModule
from spallm_kernels.triton.tiles import ALIGNMENT

_SEVERAL_GROUPS = (2, 4)


class Choice(NamedTuple):
    """Hold bits per code and groups per row of a layer."""

    bits: int
    groups: int


def choices(module: SketchedModule, config: SketchConfig) -> list[Choice]:
    """List the useful choices for a layer, including the ones of uniform bits.

    Several groups are useful only if the tables take less than 1 bit per weight: otherwise codes
    with one bit more would gain more.

    Args:
        module: The layer.
        config: Options of the conversion.

    Returns:
        The choices, by ascending bits.
    """
    found = []
    for bits in BITS:
        usual = uniform(module, bits, config)
        found += sorted({Choice(bits, 1), usual, *_several(module, bits, config)})
    return found


def uniform(module: SketchedModule, bits: int, config: SketchConfig) -> Choice:
    """Return the choice of a layer if all layers get the same bits."""
    return Choice(bits, config.groups_for(module.in_features))


def with_choice(module: SketchedModule, choice: Choice) -> SketchedModule:
    """Return the module with other bits and groups."""
    return replace(module, bits=choice.bits, groups_per_row=choice.groups)


def stored_bits(module: SketchedModule, choice: Choice, config: SketchConfig) -> int:
    """Return the size of a module on disk in bits: index map with padding, and tables."""
    specs = with_choice(module, choice).tensors("", config.mapping, config.table_dtype)
    return 8 * sum(spec.nbytes for spec in specs)


def check_target(modules: Mapping[str, SketchedModule], config: SketchConfig) -> None:
    """Check that choices for the layers of a model can meet `target_bits`.

    Args:
        modules: Modules to sketch, by name.
        config: Options of the conversion.

    Raises:
        OptionError: If the target is too low or too high.
    """
    if config.target_bits is None:
        return
    sizes = [
        [stored_bits(module, choice, config) for choice in choices(module, config)]
        for module in modules.values()
    ]
    budget_for(sizes, sum(module.weights for module in modules.values()), config.target_bits)


def budget_for(sizes: Sequence[Sequence[int]], weights: int, target: float) -> int:
    """Return the largest number of bits that does not exceed a target per weight.

    Args:
        sizes: Sizes in bits of all choices for each module, or for each set of modules.
        weights: Number of weights in all modules.
        target: Bits per weight.

    Returns:
        The budget in bits.

    Raises:
        OptionError: If no choices meet the target. The message names the lowest and the highest
            target, rounded so that both are accepted.
    """
    least, most = (sum(map(end, sizes)) for end in (min, max))
    budget = math.floor(target * weights) + 1
    while budget / weights > target:  # exact for a target that was computed by this division
        budget -= 1
    if not least <= budget <= most:
        accepted = (
            math.ceil(1000 * least / weights) / 1000,
            math.floor(1000 * most / weights) / 1000,
        )
        raise OptionError(
            f"target_bits {target:g} cannot be met: with its tables this model takes "
            f"{accepted[0]:.3f} to {accepted[1]:.3f} bits per sketched weight; choose a target in "
            f"this range"
        )
    return budget


def _several(module: SketchedModule, bits: int, config: SketchConfig) -> list[Choice]:
    found = []
    for groups in _SEVERAL_GROUPS:
        if module.in_features % (groups * ALIGNMENT) == 0:  # other groups are slow on GPUs
            choice = Choice(bits, groups)
            _, table = with_choice(module, choice).tensors("", config.mapping, config.table_dtype)
            if 8 * table.nbytes < module.weights:
                found.append(choice)
    return found
