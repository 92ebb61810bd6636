"""Find the lists of blocks of a model, and refuse models whose blocks share keys and values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from spallm_convert.errors import CalibrationError
from spallm_convert.source.experts import find_experts
from spallm_convert.source.linear_like import Proofs
from spallm_convert.source.linear_weights import LinearWeight
from spallm_convert.source.linears import is_in_block
from spallm_formats import INDEX_MAP_SUFFIX


def find_lists(model: nn.Module, linears: Iterable[str]) -> list[str]:
    """Return the paths of the outermost lists of modules that contain layers to sketch.

    Args:
        model: The model, with or without weights.
        linears: Paths in the model of the layers, or of parameters of experts.

    Raises:
        CalibrationError: No layer lies in a list.
    """
    lists = [path for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    named = list(linears)
    owners = (next((p for p in lists if name.startswith(p + ".")), None) for name in named)
    found = list(dict.fromkeys(owner for owner in owners if owner is not None))
    if not found:
        raise CalibrationError(
            f"{type(model).__name__}: for calibration, layers to sketch must lie in a list of "
            f"blocks, found {named[0]} in no list"
        )
    return found


def linear_weights(model: nn.Module) -> dict[str, LinearWeight]:
    """Return the weights of linear layers and experts in the blocks, by path of the parameter.

    Args:
        model: The model, with or without weights.
    """
    proofs = Proofs()
    found = {
        f"{path}{INDEX_MAP_SUFFIX}": proofs.linear_weight(module)
        for path, module in model.named_modules()
        if is_in_block(path)
    }
    linears = {name: weight for name, weight in found.items() if weight is not None}
    return linears | find_experts(model)[0]


def refuse_shared_keys(model: Any) -> None:
    """Raise CalibrationError if blocks of a model use keys and values of earlier blocks."""
    shared = getattr(model.config.get_text_config(), "num_kv_shared_layers", 0)
    if shared:
        raise CalibrationError(
            f"{type(model).__name__}: its last {shared} blocks use keys and values of earlier "
            f"blocks (num_kv_shared_layers), so they cannot be run one by one"
        )


def choose_plain_experts(model: Any) -> None:
    """Run experts in the model's own code, which computes the same on every device."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
