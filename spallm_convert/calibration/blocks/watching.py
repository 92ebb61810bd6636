"""Watch the inputs and outputs of the weights in a block, experts included.

Modules of experts run in the model's own plain code, with stand-ins that multiply one expert at a
time and tell about it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from spallm_convert.source.expert_weights import ExpertWeights, Product, call_with
from spallm_convert.source.linear_weights import LinearWeight

from .targets import Target, matrix

#: Takes the number of the expert (0 for a linear layer), the inputs [..., in_features] and the
#: outputs [..., out_features].
Note = Callable[[int, Tensor, Tensor], None]

#: Takes the number of an expert and inputs [tokens, in_features]; returns [tokens, out_features].
Multiply = Callable[[int, Tensor], Tensor]


class PlainExperts:
    """Takes the place of the `forward` of a module of experts.

    Args:
        module: The module.
        products: The product with each of its weights, by path of the parameter in the module.
        shapes: Shape (experts, rows, columns) of these parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        products: Mapping[str, Multiply],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._module, self._products, self._shapes = module, products, shapes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own code."""
        like = args[0] if args else next(iter(kwargs.values()))
        weights = {
            name: ExpertWeights(self._shapes[name], like, _without_direction(multiply))
            for name, multiply in self._products.items()
        }
        return call_with(self._module, weights, *args, **kwargs)


def stacked_shape(weight: LinearWeight) -> tuple[int, ...]:
    """Return the shape (experts, rows, columns) of a parameter of experts."""
    assert weight.experts is not None
    sizes = (weight.out_features, weight.in_features)
    return weight.experts, *(sizes[::-1] if weight.transposed else sizes)


def dense_products(block: nn.Module, targets: list[Target]) -> dict[str, Multiply]:
    """Return products with the dense weights of a module of experts, by parameter in the module."""

    def product(target: Target) -> Multiply:
        value = block.get_submodule(target.owner).get_parameter(target.parameter)
        return lambda expert, x: linear(x, matrix(value, target.weight, expert))

    return {target.parameter: product(target) for target in targets}


@contextlib.contextmanager
def instead_of_experts(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Call another function in place of the forward of a module, during a `with` block."""
    earlier = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if earlier is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = earlier


@contextlib.contextmanager
def watched(
    block: nn.Module, notes: Mapping[str, Note], targets: Mapping[str, Target]
) -> Iterator[None]:
    """Call functions at every use of weights in a block, during a `with` block.

    Args:
        block: The block, loaded.
        notes: The functions, by name of the target.
        targets: The targets of the block, by name.
    """
    with contextlib.ExitStack() as stack:
        by_owner: dict[str, list[Target]] = {}
        for name, note in notes.items():
            target = targets[name]
            if target.is_experts:
                by_owner.setdefault(target.owner, []).append(target)
                continue

            def hook(module: Any, args: Any, output: Tensor, note: Note = note) -> None:
                note(0, args[0], output)

            handle = block.get_submodule(target.owner).register_forward_hook(hook)
            stack.callback(handle.remove)
        for owner, listed in by_owner.items():
            products = {
                target.parameter: _noted(product, notes[target.name])
                for target, product in zip(
                    listed, dense_products(block, listed).values(), strict=True
                )
            }
            shapes = {target.parameter: stacked_shape(target.weight) for target in listed}
            module = block.get_submodule(owner)
            stack.enter_context(instead_of_experts(module, PlainExperts(module, products, shapes)))
        yield


def _without_direction(multiply: Multiply) -> Product:
    """Return a product that need not be told whether the parameter is transposed."""
    return lambda expert, x, _: multiply(expert, x)


def _noted(product: Multiply, note: Note) -> Multiply:
    def multiply(expert: int, x: Tensor) -> Tensor:
        y = product(expert, x)
        note(expert, x, y)
        return y

    return multiply
