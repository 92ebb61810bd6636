"""Find the parameters of a model that the sketched modules of a checkpoint become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from spallm_convert.source.linear_weights import LinearWeight
from spallm_convert.source.linears import find_linears
from spallm_convert.source.stored_names import Piece, loaded_names
from spallm_formats import SketchedModule, SketchMetadata

from .sketch import Sketch, Span

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resolve(
    model: PreTrainedModel, metadata: SketchMetadata
) -> tuple[dict[str, Sketch], list[str]]:
    """Find the weights that are sketched.

    Args:
        model: The dense model. Its weights may be on the meta device.
        metadata: The `quantization_config` of the checkpoint.

    Returns:
        The sketch of each weight by path of the parameter, and every problem, in one line each.
    """
    stored = {m.index_map_name(name): Span.whole(name, m) for name, m in metadata.modules.items()}
    loaded = loaded_names(model, {tensor: span.rows for tensor, span in stored.items()})
    weights = _weights(model)
    owner = type(model).__name__
    seed = metadata.hash_seed if metadata.mapping == "hash" else None
    sketches: dict[str, Sketch] = {}
    problems = [f"module {stored[t].name!r}: {reason}" for t, reason in loaded.changed.items()]
    for path, pieces in loaded.pieces.items():
        spans = tuple(_span(stored, piece) for piece in pieces)
        names = list(dict.fromkeys(span.name for span in spans))
        if path not in weights:
            problems += [f"module {name!r} is not a linear layer of {owner}" for name in names]
        elif path in loaded.doubled:
            doubled = sorted(loaded.doubled[path], key=[*stored].index)
            first, second = (stored[tensor].name for tensor in doubled[:2])
            problems.append(
                f"modules {first!r} and {second!r} are the same layer of {owner}, "
                f"{path.removesuffix('.weight')!r}, expected one of them"
            )
        elif problem := _problem(path, weights[path], spans):
            problems.append(problem)
        else:
            shape = _shape(weights[path], spans[0].module)
            sketches[path] = Sketch(shape, spans, seed)
    return sketches, problems or _uncovered(sketches, metadata)


def _weights(model: PreTrainedModel) -> dict[str, LinearWeight]:
    """Return the weights that may be sketched, by path.

    Linear layers and embeddings count anywhere in the model.
    """
    found, _ = find_linears(model)
    outside = {
        f"{path}.weight": LinearWeight(*module.weight.shape)
        for path, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, nn.Embedding)
    }
    return outside | found


def _span(stored: dict[str, Span], piece: Piece) -> Span:
    return stored[piece.tensor]._replace(first=piece.first, rows=piece.rows)


def _shape(weight: LinearWeight, module: SketchedModule) -> SketchedModule:
    """Return the shape of a sketch that has the bits and groups of a module."""
    return replace(
        module,
        in_features=weight.in_features,
        out_features=weight.out_features,
        experts=weight.experts,
        transposed=weight.transposed,
    )


def _problem(path: str, weight: LinearWeight, spans: Sequence[Span]) -> str | None:
    """Return the reason why these rows cannot be the weight of the model, in one line."""
    first = spans[0]
    if len(spans) == 1 and first.is_whole:
        sizes = _sizes(first.module)
        if sizes != _sizes(weight):
            return f"module {first.name!r} is sketched as {sizes}, the model has {_sizes(weight)}"
        return None
    kinds = [(s.module.in_features, s.module.bits, s.module.groups_per_row) for s in spans]
    other = next((s for s, kind in zip(spans, kinds, strict=True) if kind != kinds[0]), None)
    if other is not None:
        return (
            f"modules {first.name!r} and {other.name!r} are loaded as one weight, {path!r}, "
            f"expected equal in_features, bits and groups_per_row, found "
            f"{[*kinds[0]]} and {[*kinds[spans.index(other)]]}; convert the model again"
        )
    rows = sum(span.rows for span in spans)
    if rows != weight.rows or first.module.in_features != weight.in_features:
        return (
            f"module {first.name!r} and others that are loaded as {path!r} are sketched as "
            f"{[rows, first.module.in_features]} together, the model has "
            f"{[weight.rows, weight.in_features]}; either all of them must be sketched, or none"
        )
    return None


def _sizes(shape: SketchedModule | LinearWeight) -> list[int]:
    experts = [] if shape.experts is None else [shape.experts]
    return [*experts, shape.out_features, shape.in_features]


def _uncovered(sketches: dict[str, Sketch], metadata: SketchMetadata) -> list[str]:
    """Return a problem for each module with rows that no weight of the model has."""
    rows = dict.fromkeys(metadata.modules, 0)
    for sketch in sketches.values():
        for span in sketch.spans:
            rows[span.name] += span.rows
    return [
        f"module {name!r} has {metadata.modules[name].rows} rows, the model loads {count}"
        for name, count in rows.items()
        if count != metadata.modules[name].rows
    ]
