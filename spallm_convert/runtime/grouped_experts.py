"""Compute all experts of a block at once, where the model's own code is known to allow it.

Most classes of experts in transformers have the same code, which loops over experts: gate and up in
one product, an activation, the product down, and a sum weighted by the router. For this code,
tokens are sorted by expert instead, and each of both products is one call for all experts. Names of
classes do not count: the instructions that Python runs are compared.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from spallm_kernels.experts import lut_experts

from .sketch import Sketch, table_path

#: The two weights of such a class.
_GATE_UP, _DOWN = "gate_up_proj", "down_proj"


# As transformers has it, for comparison. It is not run.
def _loop(self, hidden_states, top_k_index, top_k_weights):  # type: ignore[no-untyped-def]
    final_hidden_states = torch.zeros_like(hidden_states)
    with torch.no_grad():
        expert_mask = torch.nn.functional.one_hot(top_k_index, num_classes=self.num_experts + 1)
        expert_mask = expert_mask.permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()

    for expert_idx in expert_hit:
        expert_idx = expert_idx[0]  # noqa: PLW2901
        if expert_idx == self.num_experts:
            continue
        top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
        current_state = hidden_states[token_idx]
        gate, up = nn.functional.linear(current_state, self.gate_up_proj[expert_idx]).chunk(
            2, dim=-1
        )
        current_hidden_states = self.act_fn(gate) * up
        current_hidden_states = nn.functional.linear(
            current_hidden_states, self.down_proj[expert_idx]
        )
        current_hidden_states = current_hidden_states * top_k_weights[token_idx, top_k_pos, None]
        final_hidden_states.index_add_(
            0, token_idx, current_hidden_states.to(final_hidden_states.dtype)
        )

    return final_hidden_states


def has_known_code(forward: Any) -> bool:
    """Return whether a method `forward` of experts runs the instructions of the known loop."""
    return isinstance(forward, FunctionType) and _instructions(forward) == _instructions(_loop)


def _instructions(function: Any) -> tuple[Any, ...]:
    code = function.__code__
    return code.co_code, code.co_names, code.co_varnames, code.co_consts


def can_group(module: Any) -> bool:
    """Return whether `run_grouped` computes the same as the known loop for a module.

    Args:
        module: A module of sketched experts, whose class has the known code.
    """
    sketches: dict[str, Sketch] = module.sketches
    return (
        sketches.keys() == {_GATE_UP, _DOWN}
        and all(
            sketch.numbers_rows_through and not sketch.shape.transposed
            for sketch in sketches.values()
        )
        # Experts elsewhere have a number for tokens that are not served here.
        and not getattr(module, "_is_expert_parallel", False)
        and all(sketch.shape.experts == module.num_experts for sketch in sketches.values())
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
    gate, up = _product(module, _GATE_UP, hidden_states[order // chosen], offsets).chunk(2, dim=-1)
    y = _product(module, _DOWN, module.act_fn(gate) * up, offsets)
    y = y * top_k_weights.reshape(-1)[order, None]
    place = torch.empty_like(order)
    place[order] = torch.arange(tokens * chosen, device=order.device)
    # The loop adds the experts of a token one by one, in the dtype of the hidden states. Here they
    # are added in float32, and in one order on every device.
    return y[place].view(tokens, chosen, y.shape[1]).sum(dim=1).to(hidden_states.dtype)


def _product(module: Any, path: str, x: Tensor, offsets: Tensor) -> Tensor:
    index_map, table = getattr(module, path), getattr(module, table_path(path))
    if index_map.dtype != torch.uint8:  # as in `Sketch.product`
        index_map = index_map.to(torch.uint8)
    seed = module.sketches[path].hash_seed
    return lut_experts(x, offsets, index_map, table, hash_seed=seed)
