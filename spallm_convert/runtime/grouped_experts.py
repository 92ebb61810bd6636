"""Compute all experts of a block at once, where their class declares that it can be done.

Most classes of experts in transformers loop over experts: gate and up in one product, an
activation, the product down, and a sum weighted by the router. transformers replaces this loop by
grouped products, and marks the classes for which it does (`use_experts_implementation`). The same
marks decide here: tokens are sorted by expert, and each product is one call for all experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spallm_kernels.experts import lut_experts

from .sketch import Sketch, tables_in_use

#: The two weights of such a class.
_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
#: What a class declares in transformers. Earlier versions do not declare everything; what is
#: missing there is run in a loop.
_MARKS = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
    "_is_expert_parallel": False,  # experts elsewhere have a number for tokens not served here
}


def can_group(module: Any) -> bool:
    """Return whether `run_grouped` computes what the own code of a class computes.

    Args:
        module: A module of sketched experts.
    """
    sketches: dict[str, Sketch] = module.sketches
    return (
        sketches.keys() == {_GATE_UP, _DOWN}
        and hasattr(module, "_apply_gate")
        and all(getattr(module, name, None) is value for name, value in _MARKS.items())
        and all(
            sketch.numbers_rows_through
            and not sketch.shape.transposed
            and sketch.shape.experts == module.num_experts
            for sketch in sketches.values()
        )
    )


def run_grouped(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return the outputs of the experts, weighted by the router, for each token.

    Args:
        module: A module of sketched experts for which `can_group` returned True.
        hidden_states: Float [tokens, hidden].
        top_k_index: Numbers of the experts of each token, int64 [tokens, chosen].
        top_k_weights: Their weights, float [tokens, chosen].
    """
    tokens, chosen = top_k_index.shape
    experts, order = top_k_index.reshape(-1).sort(stable=True)
    numbers = torch.arange(module.num_experts + 1, device=experts.device)
    offsets = torch.searchsorted(experts, numbers)
    gate_up = _product(module, _GATE_UP, hidden_states[order // chosen], offsets)
    y = _product(module, _DOWN, module._apply_gate(gate_up), offsets)
    y = y * top_k_weights.reshape(-1)[order, None]
    place = torch.empty_like(order)
    place[order] = torch.arange(tokens * chosen, device=order.device)
    # The loop adds the experts of a token one by one, in the dtype of the hidden states. Here they
    # are added in float32, and in one order on every device.
    return y[place].view(tokens, chosen, y.shape[1]).sum(dim=1).to(hidden_states.dtype)


def _product(module: Any, path: str, x: Tensor, offsets: Tensor) -> Tensor:
    index_map, table = getattr(module, path), tables_in_use(module, path)
    if index_map.dtype != torch.uint8:  # as in `Sketch.product`
        index_map = index_map.to(torch.uint8)
    seed = module.sketches[path].hash_seed
    return lut_experts(x, offsets, index_map, table, hash_seed=seed)
