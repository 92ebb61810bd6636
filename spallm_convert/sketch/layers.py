"""Decide which stored weights of a model are sketched, and why the others are not.

A parameter of the model may consist of several stored weights (the projections of all experts), and
a stored weight may be split into several parameters. Weights that belong together in this way are
sketched together or not at all, because a parameter cannot be sketched in part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from spallm_convert.config import SketchConfig
from spallm_convert.recipe import AUTO
from spallm_convert.source.embeddings import with_token_weights
from spallm_convert.source.linear_weights import LinearWeight
from spallm_convert.source.skeleton import Skeleton
from spallm_convert.source.stored_names import LoadedNames, Piece, loaded_names, matrix_rows
from spallm_formats import INDEX_MAP_SUFFIX, SketchedModule, StoredTensor

from .layer import Layer, Part
from .left_dense import matrices
from .problems import double_weights, missing_experts, tensor_problems
from .wishes import Stored, Wish, Wishes


@dataclass
class FoundLayers:
    """Hold the layers of a model.

    Attributes:
        layers: The layers to sketch, by name in the checkpoint.
        left_dense: The reason for every other weight of a linear layer, by name.
        ignored: Names of the tensors that the user leaves dense.
        problems: What keeps layers from being sketched although they should be.
        names: What the stored tensors become in the model.
        notes: What the user should know about the embedding and the head.
    """

    names: LoadedNames
    layers: dict[str, Layer] = field(default_factory=dict)
    left_dense: dict[str, str] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_layers(
    skeleton: Skeleton, tensors: Mapping[str, StoredTensor], config: SketchConfig
) -> FoundLayers:
    """Decide which weights of a model are sketched.

    Args:
        skeleton: The model.
        tensors: Every tensor of the checkpoint, by name.
        config: Options of the conversion.

    Returns:
        The layers.

    Raises:
        OptionError: If a pattern matches no weight, or a recipe is for weights that belong
            together and treats them differently, or the model has no embedding or head to sketch.
    """
    shapes = ((name, tensor.shape) for name, tensor in tensors.items())
    found = FoundLayers(loaded_names(skeleton.model, matrix_rows(shapes)))
    skeleton, found.notes = with_token_weights(
        skeleton, found.names, embeddings=config.embeddings, lm_head=config.lm_head
    )
    wishes = Wishes(config)
    belonging: set[str] = set()
    for parameters, names in _together(skeleton.weights, found.names):
        belonging.update(names)
        wish = wishes.wish(list(_stored(parameters, found.names)))
        reason = wish.dense
        if reason is not None:
            found.ignored.update(names)
        else:
            reason = _unfit(parameters, names, skeleton, found.names)
        if reason is None:
            made = list(_made(parameters, names, skeleton, found.names, tensors, config, wish))
            reason = _reason_to_keep(made, config, wish)
            if reason is None:
                _add(made, parameters, found)
        if reason is not None:
            kept = names or parameters
            found.left_dense |= {name.removesuffix(INDEX_MAP_SUFFIX): reason for name in kept}
    counts = {weight.experts for weight in skeleton.weights.values() if weight.experts}
    found.problems += missing_experts(tensors, counts)
    _leave_others(tensors.keys() - belonging, tensors, wishes, found)
    wishes.check()
    return found


def _add(layers: list[Layer], parameters: list[str], found: FoundLayers) -> None:
    """Add layers that are sketched, and what keeps them from it."""
    found.layers |= {layer.name: layer for layer in layers}
    for parameter in parameters:
        found.problems += double_weights(parameter, found.names)
    for layer in layers:
        expected = _stored_shape(layer, layer.weight.shape)
        found.problems += tensor_problems(layer.weight, expected)


def _leave_others(
    names: Collection[str], tensors: Mapping[str, StoredTensor], wishes: Wishes, found: FoundLayers
) -> None:
    """Note the matrices of no linear layer that the user leaves dense; they stay so in any case."""
    for name in matrices({name: tensor for name, tensor in tensors.items() if name in names}):
        reason = wishes.unwanted(name)
        if reason is not None:
            found.ignored.add(name)
            found.left_dense[name] = reason


def _stored(parameters: list[str], names: LoadedNames) -> Iterator[Stored]:
    """Yield the names of weights that belong together."""
    for parameter in parameters:
        tensors = dict.fromkeys(piece.tensor for piece in names.pieces.get(parameter, ()))
        yield from (Stored(tensor, parameter) for tensor in tensors or [None])


def _together(
    weights: Mapping[str, LinearWeight], names: LoadedNames
) -> Iterator[tuple[list[str], list[str]]]:
    """Yield parameters and stored tensors that belong together; no tensors if none is stored."""
    becomes = names.parameters()
    done: set[str] = set()
    for first in weights:
        if first in done:
            continue
        parameters, tensors = [first], []
        for parameter in parameters:  # grows while it is read
            for piece in names.pieces.get(parameter, ()):
                if piece.tensor not in tensors:
                    tensors.append(piece.tensor)
                    parameters += [p for p in becomes[piece.tensor] if p not in parameters]
        done.update(parameters)
        yield parameters, tensors


def _unfit(
    parameters: list[str], tensors: list[str], skeleton: Skeleton, names: LoadedNames
) -> str | None:
    """Return why weights that belong together cannot be sketched, None if they can."""
    for parameter in parameters:
        if parameter in skeleton.unfit:
            return skeleton.unfit[parameter]
        weight = skeleton.weights.get(parameter)
        if weight is None:
            return "transformers loads it into weights that are not all of linear layers"
        pieces = names.pieces.get(parameter, ())
        if not pieces:
            return "its weight is not in the checkpoint"
        if len(pieces) > 1 and weight.transposed and len(pieces) != weight.experts:
            return "transformers joins its columns with those of other weights"
    for tensor in tensors:
        whole_experts = _fused(parameters[0], skeleton, names)
        if not whole_experts and not tensor.endswith(INDEX_MAP_SUFFIX):
            return f"its name does not end in {INDEX_MAP_SUFFIX}"
    return None


def _fused(parameter: str, skeleton: Skeleton, names: LoadedNames) -> bool:
    """Return whether all experts of a parameter are stored in one tensor."""
    has_experts = skeleton.weights[parameter].experts is not None
    return has_experts and len(names.pieces[parameter]) == 1


def _made(
    parameters: list[str],
    tensors: list[str],
    skeleton: Skeleton,
    names: LoadedNames,
    stored: Mapping[str, StoredTensor],
    config: SketchConfig,
    wish: Wish,
) -> Iterator[Layer]:
    """Yield the layers of weights that belong together."""
    by_tensor: dict[str, list[Part]] = {name: [] for name in tensors}
    for parameter in parameters:
        pieces = names.pieces[parameter]
        first = 0
        for piece in pieces:
            rows = _rows(piece, pieces, skeleton.weights[parameter], stored)
            by_tensor[piece.tensor].append(Part(parameter, first, piece.first, rows))
            first += rows
    for name, parts in by_tensor.items():
        tensor = stored[name]
        weight = skeleton.weights[parts[0].parameter]
        fused = _fused(parts[0].parameter, skeleton, names)
        is_transposed = weight.transposed != _turned(parts[0].parameter, tensor, skeleton, names)
        module = SketchedModule(
            in_features=weight.in_features,
            out_features=weight.out_features if fused else sum(part.rows for part in parts),
            bits=wish.bits,
            groups_per_row=config.groups_for(weight.in_features, wish.groups),
            experts=weight.experts if fused else None,
            transposed=is_transposed,
        )
        short = name if fused else name.removesuffix(INDEX_MAP_SUFFIX)
        yield Layer(short, module, tensor, tuple(parts))


def _rows(
    piece: Piece,
    pieces: tuple[Piece, ...],
    weight: LinearWeight,
    stored: Mapping[str, StoredTensor],
) -> int:
    """Return the rows of the sketch that a piece of a parameter has."""
    if len(pieces) == 1 and piece.first == 0 and piece.rows == _all_rows(stored[piece.tensor]):
        return weight.rows
    return weight.out_features if weight.transposed else piece.rows


def _all_rows(tensor: StoredTensor) -> int:
    return matrix_rows([(tensor.name, tensor.shape)])[tensor.name]


def _turned(parameter: str, tensor: StoredTensor, skeleton: Skeleton, names: LoadedNames) -> bool:
    """Return whether transformers transposes a stored tensor while loading."""
    shape = tuple(skeleton.model.get_parameter(parameter).shape)
    return parameter in names.transposed and tensor.shape != shape


def _stored_shape(layer: Layer, found: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a layer's dense weight should have in the checkpoint."""
    module = layer.module
    sizes = (module.out_features, module.in_features)
    rows, columns = sizes[::-1] if module.transposed else sizes
    if module.experts is None:
        return rows, columns
    # DBRX stores the rows of all experts below each other.
    return (module.experts * rows, columns) if len(found) == 2 else (module.experts, rows, columns)


def _reason_to_keep(layers: list[Layer], config: SketchConfig, wish: Wish) -> str | None:
    """Return the reason to keep layers dense, None if they are to be sketched."""
    if wish.groups != AUTO:
        return None
    for layer in layers:
        specs = layer.module.tensors(layer.name, config.mapping, config.table_dtype)
        if sum(spec.nbytes for spec in specs) >= layer.weight.nbytes:
            columns = layer.module.in_features
            return f"with {columns} columns its tables would be larger than the space they save"
    return None
