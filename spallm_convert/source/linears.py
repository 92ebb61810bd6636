"""Find the parameters of a model that are the weights of linear layers, or of experts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .experts import find_experts
from .linear_weights import LinearWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IN_BLOCK = re.compile(r"(^|\.)\d+\.")


def find_linears(
    model: PreTrainedModel,
) -> tuple[dict[str, LinearWeight], dict[str, str]]:
    """Find the weights inside the model's blocks that may be sketched.

    Args:
        model: The model, whose weights may be on the meta device.

    Returns:
        Every such weight by path of the parameter, and the reason for each of them that cannot be
        sketched, by path of the parameter.
    """
    import torch

    weights = {
        f"{name}.weight": LinearWeight(module.out_features, module.in_features)
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and is_in_block(name)
    }
    unfit = _unfit(model, set(weights))
    experts, unfit_experts = find_experts(model)
    return weights | experts, unfit | unfit_experts


def is_in_block(name: str) -> bool:
    """Return whether a module lies inside a numbered block, given its path."""
    return _IN_BLOCK.search(name) is not None


def _unfit(model: PreTrainedModel, weights: set[str]) -> dict[str, str]:
    read = dict.fromkeys(
        _read_as_floats(model) & weights,
        "the model's code needs its weight in floating point",
    )
    pairs: dict[str, Any] = getattr(model, "all_tied_weights_keys", {})  # not in all remote code
    tied = {*pairs, *pairs.values()}
    reason = "the model ties its weight to that of another layer"
    return read | dict.fromkeys(weights & tied, reason)


def _read_as_floats(model: PreTrainedModel) -> set[str]:
    """Return the weights that are read by other code than that of their own module.

    Models compare the dtype of weights that transformers keeps in float32. Mixers of state-space
    models (they have A and D) pass the weights of several layers to one kernel.
    """
    kept = (model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict)
    patterns = "|".join(re.escape(name) for names in kept for name in names or ())
    declared = re.compile(rf"(^|\.)({patterns})(\.|$)")
    found = set()
    for name, module in model.named_modules():
        if patterns and declared.search(name + ".weight"):
            found.add(f"{name}.weight")
        if hasattr(module, "A_log") and hasattr(module, "D"):
            found |= {f"{name}.{part}.weight" for part in ("x_proj", "dt_proj", "out_proj")}
    return found
