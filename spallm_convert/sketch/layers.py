"""Decide which stored weights of a model are sketched, and why the others are not.

A parameter of the model may consist of several stored weights (the projections of all experts), and
a stored weight may be split into several parameters. Weights that belong together in this way are
sketched together or not at all, because a parameter cannot be sketched in part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from spallm_convert.config import AUTO, SketchConfig
from spallm_convert.source.embeddings import with_token_weights
from spallm_convert.source.linear_weights import LinearWeight
from spallm_convert.source.skeleton import Skeleton
from spallm_convert.source.stored_names import LoadedNames, Piece, loaded_names, matrix_rows
from spallm_formats import INDEX_MAP_SUFFIX, SketchedModule, StoredTensor

from .ignoring import check_patterns, matches
from .layer import Layer, Part
from .problems import double_weights, tensor_problems


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
        OptionError: If a pattern to ignore matches no weight, or the model has no embedding or head
            to sketch.
    """
    shapes = ((name, tensor.shape) for name, tensor in tensors.items())
    found = FoundLayers(loaded_names(skeleton.model, matrix_rows(shapes)))
    skeleton, found.notes = with_token_weights(
        skeleton, found.names, embeddings=config.embeddings, lm_head=config.lm_head
    )
    seen: list[tuple[str, ...]] = []
    for parameters, names in _together(skeleton.weights, found.names):
        paths = [parameter.removesuffix(INDEX_MAP_SUFFIX) for parameter in parameters]
        every = [*paths, *(name.removesuffix(INDEX_MAP_SUFFIX) for name in names)]
        seen.append(tuple(every))
        pattern = next((p for p in config.ignore if matches(p, *every)), None)
        if pattern is not None:
            found.ignored.update(names)
            reason: str | None = f"ignored by the pattern {pattern!r}"
        else:
            reason = _unfit(parameters, names, skeleton, found.names)
        if reason is None:
            made = list(_made(parameters, names, skeleton, found.names, tensors, config))
            reason = _reason_to_keep(made, config)
            if reason is None:
                found.layers |= {layer.name: layer for layer in made}
                for parameter in parameters:
                    found.problems += double_weights(parameter, found.names)
                for layer in made:
                    expected = _stored_shape(layer, tensors[layer.weight.name].shape)
                    found.problems += tensor_problems(layer.weight, expected)
        if reason is not None:
            kept = names or parameters
            found.left_dense |= {name.removesuffix(INDEX_MAP_SUFFIX): reason for name in kept}
    check_patterns(config.ignore, seen)
    return found


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
) -> Iterator[Layer]:
    """Yield the layers of weights that belong together."""
    for name in tensors:
        tensor = stored[name]
        parts: list[Part] = []
        for parameter in parameters:
            weight = skeleton.weights[parameter]
            pieces = names.pieces[parameter]
            first = 0
            for piece in pieces:
                rows = _rows(piece, pieces, weight, stored)
                if piece.tensor == name:
                    parts.append(Part(parameter, first, piece.first, rows))
                first += rows
        weight = skeleton.weights[parts[0].parameter]
        fused = _fused(parts[0].parameter, skeleton, names)
        is_transposed = weight.transposed != _turned(parts[0].parameter, tensor, skeleton, names)
        module = SketchedModule(
            in_features=weight.in_features,
            out_features=weight.out_features if fused else sum(part.rows for part in parts),
            bits=config.bits,
            groups_per_row=config.groups_for(weight.in_features),
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


def _reason_to_keep(layers: list[Layer], config: SketchConfig) -> str | None:
    """Return the reason to keep layers dense, None if they are to be sketched."""
    if config.groups_per_row != AUTO:
        return None
    for layer in layers:
        specs = layer.module.tensors(layer.name, config.mapping, config.table_dtype)
        if sum(spec.nbytes for spec in specs) >= layer.weight.nbytes:
            columns = layer.module.in_features
            return f"with {columns} columns its tables would be larger than the space they save"
    return None
