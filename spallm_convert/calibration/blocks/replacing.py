"""Put sketched layers with trainable tables into a block, in the place of its dense layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from spallm_convert.runtime.linear import SketchedLinear
from spallm_convert.source.linear_weights import LinearWeight
from spallm_kernels.linear import lut_linear

from .targets import all_targets
from .watching import Multiply, PlainExperts, stacked_shape

#: Takes the path in the model of a linear layer, or of a parameter of experts, and the module that
#: has it. Returns the layer to put in its place, with the rows of all experts below each other.
#: None keeps the dense layer.
Replace = Callable[[str, nn.Module], SketchedLinear | None]


def put_layers(
    block: nn.Module, path: str, linears: Mapping[str, LinearWeight], replace: Replace
) -> dict[str, SketchedLinear]:
    """Replace layers of a block.

    Args:
        block: The block, loaded.
        path: Path of the block in the model.
        linears: The weights of linear layers and experts, by path of the parameter in the model.
        replace: Returns the layer to put in the place of a layer.

    Returns:
        The new layers, by path in the model.
    """
    found: dict[str, SketchedLinear] = {}
    of_experts: dict[str, dict[str, tuple[SketchedLinear, LinearWeight]]] = {}
    for target in all_targets(block, path, linears).values():
        other = replace(target.path, block.get_submodule(target.owner))
        if other is None:
            continue
        found[target.path] = other
        if target.is_experts:
            of_experts.setdefault(target.owner, {})[target.parameter] = other, target.weight
        else:
            block.set_submodule(target.name, other)
    for owner, others in of_experts.items():
        _put_experts(block.get_submodule(owner), others)
    return found


def _put_experts(
    module: nn.Module, others: Mapping[str, tuple[SketchedLinear, LinearWeight]]
) -> None:
    """Let a module of experts multiply with sketched weights; free the dense ones."""
    products: dict[str, Multiply] = {}
    for name, (other, weight) in others.items():
        owner, _, last = name.rpartition(".")
        holder = module.get_submodule(owner)
        del holder._parameters[last]
        holder.add_module(last, other)  # under the same path, so that its tables are found there
        products[name] = _product(other, weight.out_features)
    shapes = {name: stacked_shape(weight) for name, (_, weight) in others.items()}
    module.__dict__["forward"] = PlainExperts(module, products, shapes)


def _product(layer: SketchedLinear, size: int) -> Multiply:
    """Return the product with one of the experts whose rows lie below each other in a layer."""

    def multiply(expert: int, x: Tensor) -> Tensor:
        rows = slice(expert * size, (expert + 1) * size)
        index_map: Tensor = layer.weight
        return lut_linear(
            x, index_map[rows], layer.weight_table[rows], None, hash_seed=layer.hash_seed
        )

    return multiply
