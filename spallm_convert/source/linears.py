"""Find the parameters of a model that are the weights of linear layers, or of experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .experts import find_experts
from .linear_like import Proofs, may_be_linear
from .linear_weights import LinearWeight
from .weight_reads import known_reads, read_weights
from .weight_watch import watch_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUMBERED = re.compile(r"(^|\.)\d+(\.|$)")
#: A list of layers whose name says that they give the model's outputs: one per codebook, or a
#: classifier of several layers.
_HEADS = re.compile(r"(^|\.)[^.]*(head|classifier|score|logit)[^.]*\.\d+$")

#: A router inside a block of experts, such as "mlp.gate.wg.weight"; the group is the block.
_ROUTER = re.compile(r"^(.*)\.(?:router|gate)\.(?:.+\.)?weight$")


def find_linears(
    model: PreTrainedModel,
) -> tuple[dict[str, LinearWeight], dict[str, str]]:
    """Find the weights inside the model's blocks that may be sketched.

    A module counts if it can be replaced by an `nn.Linear`. Layers outside of numbered blocks stay
    dense: heads, embeddings, and projectors between towers such as
    "multi_modal_projector.linear_1", which have less than 5 % of a model's weights.

    Args:
        model: The model, whose weights may be on the meta device.

    Returns:
        Every such weight by path of the parameter, and the reason for each of them that cannot be
        sketched, by path of the parameter.
    """
    import torch

    proofs = Proofs()
    weights: dict[str, LinearWeight] = {}
    unfit: dict[str, str] = {}
    for name, module in model.named_modules():
        if not is_in_block(name):
            continue
        weight = proofs.linear_weight(module)
        if weight is not None:
            weights[f"{name}.weight"] = weight
        elif isinstance(module, torch.nn.Linear) and may_be_linear(module):
            kind = type(module).__name__
            unfit[f"{name}.weight"] = f"{kind} computes more than the product with its weight"
    experts, unfit_experts = find_experts(model)
    unfit |= _unfit(model, set(weights)) | _routers(model, experts)
    return weights | experts, unfit | unfit_experts


def is_in_block(name: str) -> bool:
    """Return whether a module belongs to the model's blocks, given its path.

    It lies inside a numbered block, or is a numbered layer of a list such as
    "altup_projections.0". Lists of heads do not count.
    """
    return _NUMBERED.search(name) is not None and (
        _NUMBERED.search(name.rpartition(".")[0]) is not None or _HEADS.search(name) is None
    )


def _unfit(model: PreTrainedModel, weights: set[str]) -> dict[str, str]:
    read = {
        name: f"the model's code reads its weight ({function})"
        for name, function in (_noticed(model, weights) | read_weights(model, weights)).items()
    }
    pairs: dict[str, Any] = getattr(model, "all_tied_weights_keys", {})  # not in all remote code
    tied = {*pairs, *pairs.values()}
    return read | dict.fromkeys(
        weights & tied, "the model ties its weight to that of another layer"
    )


def _noticed(model: PreTrainedModel, weights: set[str]) -> dict[str, str]:
    """Return the weights that the code of a repository is seen to read, with the function.

    transformers' own code is not run: its source shows every read, and real sizes take seconds.
    """
    own = ("transformers.", "torch.")
    if all(type(module).__module__.startswith(own) for module in model.modules()):
        return {}
    known = known_reads(model, weights)  # `read_weights` decides about these
    noticed = watch_weights(model, weights)
    return {name: function for name, function in noticed.items() if (name, function) not in known}


def _routers(model: PreTrainedModel, experts: Mapping[str, LinearWeight]) -> dict[str, str]:
    """Return the weights that choose the experts. A wrong choice costs more than they would save.

    Some models have modules of their own for them, which are no linear layers.
    """
    counts = {path.rpartition(".experts.")[0]: found.experts for path, found in experts.items()}
    return {
        name: "it chooses the experts"
        for name, parameter in model.named_parameters()
        if (router := _ROUTER.search(name)) and counts.get(router[1]) == parameter.shape[0]
    }
