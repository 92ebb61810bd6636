"""Sum the inputs of the experts of a block, in a bounded amount of memory.

X are the inputs of one expert. If few tokens of the text reach it, X^T X says little about inputs
in general. So it is shrunk towards the mean of all experts, as if the expert had seen as many more
tokens as it has columns, with the mean second moment of all inputs. An expert that no token reaches
gets the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .blocks.blocks import Blocks
from .blocks.stages import check_sums, flat_inputs
from .blocks.targets import Target
from .blocks.watching import (
    Multiply,
    PlainExperts,
    dense_products,
    instead_of_experts,
    stacked_shape,
)

#: Bytes of the sums over inputs that are in memory at a time, at least those of one expert.
_SUM_BYTES = 1 << 30


@dataclass
class SeenExperts:
    """Count the experts that few tokens of the text reach.

    Attributes:
        seen: All experts, by path of their module in the model and number.
        few: Those that get fewer tokens than a weight of theirs has columns.
    """

    seen: set[tuple[str, int]] = field(default_factory=set)
    few: set[tuple[str, int]] = field(default_factory=set)


class ExpertSums(NamedTuple):
    """Sums over the inputs of one expert.

    Attributes:
        expert: Number of the expert.
        tokens: Number of tokens that reach it.
        hessian: X^T X, float64 [columns, columns].
        shrunk: X^T X per token, shrunk towards the mean of all experts.
    """

    expert: int
    tokens: int
    hessian: Tensor
    shrunk: Tensor


def sum_expert_inputs(
    blocks: Blocks,
    number: int,
    block: nn.Module,
    target: Target,
    targets: Mapping[str, Target],
    hidden: list[Tensor],
) -> Iterator[ExpertSums]:
    """Yield the sums of every expert, in order.

    The block is run once for all experts if their sums fit into memory. If not, it is run once for
    the mean, and then for as many experts at a time as fit.

    Args:
        blocks: The dense model.
        number: Number of the block.
        block: The block that is being sketched. The target may be changed between two experts.
        target: The parameter of experts.
        targets: All targets of the block, by name.
        hidden: Hidden states that enter the block in the sketched model, by batch.

    Raises:
        CalibrationError: Inputs are not finite.
    """
    assert target.weight.experts is not None
    experts, columns = target.weight.experts, target.weight.in_features
    siblings = [other for other in targets.values() if other.owner == target.owner]
    counts = [0] * experts

    def zeros() -> Tensor:
        return torch.zeros(columns, columns, dtype=torch.float64, device=blocks.device)

    def run(chosen: Collection[int], add: Callable[[int, Tensor], None]) -> None:
        module = block.get_submodule(target.owner)
        forward = _recording(block, target, siblings, chosen, add)
        with instead_of_experts(module, forward):
            for batch, states in enumerate(hidden):
                blocks.run(number, block, states, batch, sketched=True)

    def sums(chosen: Collection[int]) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}

        def add(expert: int, x: Tensor) -> None:
            if expert not in found:
                found[expert] = zeros()
            found[expert] += x.T @ x

        run(chosen, add)
        return found

    at_once = max(1, _SUM_BYTES // (8 * columns**2))
    total = zeros()

    def add_all(expert: int, x: Tensor) -> None:
        counts[expert] += int(x.any(-1).sum())  # Llama 4 passes zeros for tokens of other experts
        if experts > at_once:
            total.add_(x.T @ x)
        elif counts[expert]:
            kept.setdefault(expert, zeros()).add_(x.T @ x)

    kept: dict[int, Tensor] = {}
    run(range(experts), add_all)
    for hessian in kept.values():
        total += hessian
    check_sums(target.path, total)
    mean = total / max(1, sum(counts))
    for first in range(0, experts, at_once):
        chosen = range(first, min(first + at_once, experts))
        found = kept if experts <= at_once else sums([e for e in chosen if counts[e]])
        for expert in chosen:
            hessian = found.pop(expert) if counts[expert] else zeros()
            shrunk = (hessian + columns * mean) / (counts[expert] + columns)
            yield ExpertSums(expert, counts[expert], hessian, shrunk)


def _recording(
    block: nn.Module,
    target: Target,
    siblings: list[Target],
    chosen: Collection[int],
    add: Callable[[int, Tensor], None],
) -> PlainExperts:
    """Return the forward of a module of experts that calls `add` with the inputs of a target.

    Products that decide no wanted inputs are not computed: those of other experts, and the target's
    own, behind which nothing is recorded.
    """

    def product(other: Target, dense: Multiply) -> Multiply:
        def multiply(expert: int, x: Tensor) -> Tensor:
            if other is target and expert in chosen:
                add(expert, flat_inputs(x))
            elif other is not target and expert in chosen:
                return dense(expert, x)
            return x.new_zeros(len(x), other.weight.out_features)

        return multiply

    dense = dense_products(block, siblings)
    products = {other.parameter: product(other, dense[other.parameter]) for other in siblings}
    shapes = {other.parameter: stacked_shape(other.weight) for other in siblings}
    return PlainExperts(block.get_submodule(target.owner), products, shapes)
