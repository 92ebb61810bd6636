"""Say which layers are not calibrated, and how many experts few tokens reach."""

from __future__ import annotations

from spallm_convert.config import SketchConfig
from spallm_convert.errors import OptionError
from spallm_convert.sketch.plan import Plan
from spallm_convert.source.skeleton import numbers_starred

from .blocks.blocks import Blocks
from .store import CalibratedModules


def partly_calibrated(blocks: Blocks, plan: Plan, config: SketchConfig) -> str | None:
    """Return a sentence on layers that are sketched without calibration, None without any.

    Args:
        blocks: The blocks that the text runs through.
        plan: The layers to sketch.
        config: Options of the conversion.

    Raises:
        OptionError: There are some, and bits are to be chosen by the text.
    """
    layers = plan.layers.values()
    reached = {
        layer.name
        for listed in blocks.lists
        for number in range(len(listed))
        for target in listed.targets(number, layers).values()
        for layer in target.layers
    }
    left = [name for name in plan.layers if name not in reached]
    if not left:
        return None
    kinds = list(dict.fromkeys(map(numbers_starred, left)))
    named = ", ".join(kinds[:3]) + (f" and {len(kinds) - 3} more" if len(kinds) > 3 else "")
    lists = " and ".join(listed.path for listed in blocks.lists)
    rest = f"{len(left)} other layers ({named})"
    if config.target_bits is not None:
        raise OptionError(
            f"target_bits chooses bits by running the text through {lists}, found {rest}; use "
            f"--bits, or leave them dense with --ignore"
        )
    return f"calibrated are the layers in {lists}; {rest} are sketched from their weights alone"


def few_tokens_note(sketches: CalibratedModules) -> str | None:
    """Return a sentence on experts that few tokens reached, None without experts.

    Args:
        sketches: The calibrated modules.
    """
    few, seen = sketches.experts
    if not seen:
        return None
    return (
        f"{few:,} of {seen:,} experts saw fewer tokens of the text than their weights have columns"
    )
