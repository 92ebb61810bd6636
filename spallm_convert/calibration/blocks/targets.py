"""The parameters of a block that are sketched, and the rows of the stored weights in them.

A parameter is the weight of a linear layer, or holds the weights of all experts of a block. Several
stored weights may form one parameter, and one stored weight may be split into several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from spallm_convert.sketch.layer import Layer, Part
from spallm_convert.source.experts import expert_modules
from spallm_convert.source.linear_weights import LinearWeight
from spallm_formats import INDEX_MAP_SUFFIX, SketchedModule


class Segment(NamedTuple):
    """Consecutive rows of a parameter that come from one stored weight and belong to one expert.

    Attributes:
        layer: The stored weight.
        expert: Number of the expert in the parameter, 0 without experts.
        first: Number of the first row in the expert.
        rows: Number of rows.
        stored: Number of the first row in the stored weight. Rows of fused experts lie below each
            other.
        stored_of_expert: Number of the first row in its expert of the stored weight.
    """

    layer: Layer
    expert: int
    first: int
    rows: int
    stored: int
    stored_of_expert: int


@dataclass(frozen=True)
class Target:
    """A parameter of a block that is sketched.

    Attributes:
        name: Path in the block of the linear layer, or of the parameter of experts.
        path: The same path in the model.
        owner: Path in the block of the linear layer, or of the module of experts.
        weight: Sizes, number of experts, and whether the parameter has a row per input.
        pieces: The stored weights, and their rows in the parameter.
    """

    name: str
    path: str
    owner: str
    weight: LinearWeight
    pieces: tuple[tuple[Layer, Part], ...]

    @property
    def parameter(self) -> str:
        """Return the path of the parameter in its owner."""
        return self.name.removeprefix(self.owner + ".") if self.is_experts else "weight"

    @property
    def is_experts(self) -> bool:
        """Return whether the parameter holds the weights of experts."""
        return self.weight.experts is not None

    @property
    def module(self) -> SketchedModule:
        """Return bits, groups and columns, which all stored weights share."""
        return self.pieces[0][0].module

    @property
    def layers(self) -> list[Layer]:
        """Return the stored weights."""
        return list({layer.name: layer for layer, _ in self.pieces}.values())

    def segments(self) -> Iterator[Segment]:
        """Yield the rows in the order of the parameter, cut where an expert ends."""
        size = self.weight.out_features
        for layer, part in sorted(self.pieces, key=lambda piece: piece[1].first):
            done = 0
            while done < part.rows:
                expert, first = divmod(part.first + done, size)
                rows = min(part.rows - done, size - first)
                stored = part.stored_first + done
                fused = layer.module.experts is not None
                own = stored % layer.module.out_features if fused else stored
                yield Segment(layer, expert, first, rows, stored, own)
                done += rows

    def rows(self, block: nn.Module, expert: int = 0) -> Tensor:
        """Return a view of the weights in a block: [out_features, in_features].

        Args:
            block: The block, loaded.
            expert: Number of the expert.
        """
        value = block.get_submodule(self.owner).get_parameter(self.parameter)
        return matrix(value, self.weight, expert)


def matrix(parameter: Tensor, weight: LinearWeight, expert: int = 0) -> Tensor:
    """Return a view of a parameter, or of one expert's part, with a row per output.

    Args:
        parameter: The parameter.
        weight: Its sizes.
        expert: Number of the expert.
    """
    sizes = (weight.out_features, weight.in_features)
    if weight.experts is not None:
        parameter = parameter.view(weight.experts, *(sizes[::-1] if weight.transposed else sizes))
        parameter = parameter[expert]
    return parameter.T if weight.transposed else parameter


def find_targets(
    block: nn.Module, path: str, layers: Iterable[Layer], weights: Mapping[str, LinearWeight]
) -> dict[str, Target]:
    """Return the parameters of a block that are sketched, by name.

    Args:
        block: The block.
        path: Its path in the model.
        layers: The stored weights to sketch.
        weights: All weights of linear layers and experts, by path of the parameter in the model.
    """
    pieces: dict[str, list[tuple[Layer, Part]]] = {}
    for layer in layers:
        for part in layer.parts:
            if part.parameter.startswith(path + "."):
                pieces.setdefault(part.parameter, []).append((layer, part))
    found = all_targets(block, path, {name: weights[name] for name in pieces})
    return {
        name: replace(target, pieces=tuple(pieces[parameter]))
        for parameter, (name, target) in zip(pieces, found.items(), strict=True)
    }


def all_targets(
    block: nn.Module, path: str, weights: Mapping[str, LinearWeight]
) -> dict[str, Target]:
    """Return the weights of a block, by name, without the stored weights that they come from.

    Args:
        block: The block.
        path: Its path in the model.
        weights: Weights of linear layers and experts, by path of the parameter in the model. Those
            outside of the block are left out.
    """
    start = path + "."
    experts = [inner for inner, _ in expert_modules(block)]
    found = {}
    for parameter, weight in weights.items():
        if not parameter.startswith(start):
            continue
        inner = parameter.removeprefix(start)
        name = owner = inner.removesuffix(INDEX_MAP_SUFFIX)
        if weight.experts is not None:
            owner = next(module for module in experts if inner.startswith(module + "."))
            name = inner
        found[name] = Target(name, start + name, owner, weight, ())
    return found
