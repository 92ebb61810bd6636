"""Find which parameters of a model the tensors of a checkpoint become when transformers loads them.

transformers renames tensors, stacks the experts of a block, and concatenates or splits projections.
Its own conversion tables are asked, so every model that it loads is found here too. Only changes
that move whole rows are followed, because a sketch can be changed in the same way. For all others,
the reason is given.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Piece:
    """Describe consecutive rows of a stored matrix. Fused experts count as one long matrix.

    Attributes:
        tensor: Name of the tensor in the checkpoint.
        first: Number of the first row.
        rows: Number of rows.
    """

    tensor: str
    first: int
    rows: int


@dataclass(frozen=True)
class LoadedNames:
    """Hold where the parameters of a model come from.

    Attributes:
        pieces: The rows that each parameter consists of, in order, by name of the parameter.
        changed: What transformers does to tensors whose values no parameter has as they are, by
            name of the tensor.
        doubled: Tensors that are the same parameter, for parameters that are stored twice.
        transposed: Parameters that transformers transposes while loading, if their shape needs it.
        turned: Stored matrices whose transposes are parameters, whatever the shapes are, by name of
            the parameter. Index maps must not be transposed, so they are in `changed` too.
    """

    pieces: dict[str, tuple[Piece, ...]]
    changed: dict[str, str]
    doubled: dict[str, list[str]]
    transposed: frozenset[str]
    turned: dict[str, Piece] = field(default_factory=dict)

    def stored(self, parameter: str) -> str | None:
        """Return the one tensor that a parameter is stored in; None if there is not exactly one."""
        found = {piece.tensor for piece in self.pieces.get(parameter, ())}
        return found.pop() if len(found) == 1 else None

    def parameters(self) -> dict[str, list[str]]:
        """Return the parameters that each tensor becomes, by name of the tensor."""
        found: dict[str, list[str]] = defaultdict(list)
        for parameter, pieces in self.pieces.items():
            for tensor in dict.fromkeys(piece.tensor for piece in pieces):
                found[tensor].append(parameter)
        return dict(found)


class _UnknownError(Exception):
    """Raised for a conversion that does more than move rows."""


def loaded_names(model: PreTrainedModel, rows: Mapping[str, int]) -> LoadedNames:
    """Find the parameters that stored tensors become.

    Args:
        model: The dense model. Its weights may be on the meta device.
        rows: The number of rows of each tensor of the checkpoint, by name. Tensors that are no
            matrices may have any number.

    Returns:
        Where the parameters come from.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    by_pattern = {source: c for c in converters for source in c.source_patterns}
    own = model.state_dict()
    collected: dict[str, dict[str | None, list[str]]] = {}
    for name in sorted(rows, key=_natural):
        target, pattern = _renamed(name, renamings, converters, model.base_model_prefix, own)
        collected.setdefault(target, {}).setdefault(pattern, []).append(name)
    pieces: dict[str, tuple[Piece, ...]] = {}
    changed: dict[str, str] = {}
    doubled: dict[str, list[str]] = {}
    transposed = set()
    turned: dict[str, Piece] = {}
    for target, sources in collected.items():
        names = [name for group in sources.values() for name in group]
        if None in sources:
            pieces[target] = (_whole(names[0], rows),)
            if len(names) > 1:
                doubled[target] = names
            continue
        converter = by_pattern[next(pattern for pattern in sources if pattern is not None)]
        try:
            pieces |= _moved(converter, target, sources, rows, own)
        except _UnknownError as unknown:
            changed |= dict.fromkeys(names, str(unknown))
        if [type(op).__name__ for op in converter.operations] == ["Transpose"]:
            transposed.add(target)
            if target not in pieces and _turns_matrices(converter.operations[0], own.get(target)):
                turned[target] = _whole(names[0], rows)
    return LoadedNames(pieces, changed, doubled, frozenset(transposed), turned)


def _renamed(
    name: str, renamings: list[Any], converters: list[Any], prefix: str, own: dict[str, Any]
) -> tuple[str, str | None]:
    """Return the parameter that a tensor becomes (or helps to form), and a converter's pattern."""
    from transformers.core_model_loading import rename_source_key

    target, pattern = rename_source_key(name, renamings, converters, prefix, own)
    if target not in own and pattern is None:  # then transformers adds or removes only the prefix
        return rename_source_key(name, [], [], prefix, own)
    return target, pattern


def _moved(
    converter: Any,
    target: str,
    sources: Mapping[str | None, Sequence[str]],
    rows: Mapping[str, int],
    own: Mapping[str, Any],
) -> dict[str, tuple[Piece, ...]]:
    """Return the pieces of the parameters that a converter makes.

    Raises:
        _UnknownError: If it does more than move rows.
    """
    # transformers aligns the memory of some tensors, which changes no value.
    operations = [op for op in converter.operations if type(op).__name__ != "Force16BytesAlignment"]
    kinds = [(type(op).__name__, getattr(op, "dim", None)) for op in operations]
    ordered = [sources[pattern] for pattern in converter.source_patterns if pattern in sources]
    whole = [[_whole(name, rows) for name in group] for group in ordered]
    match kinds:
        case [] | [("Concatenate", 0)]:
            return {target: tuple(piece for group in whole for piece in group)}
        case [("Transpose", _)] if operations[0].check_dims:
            return {target: (whole[0][0],)}
        case [("MergeModulelist", 0)] | [("MergeModulelist", 0), ("Concatenate", 1)]:
            if len({len(group) for group in whole}) != 1:
                raise _UnknownError("the experts of its block are not all stored")
            return {target: tuple(piece for expert in zip(*whole, strict=True) for piece in expert)}
        case [("ErnieFuseAndSplitTextVisionExperts", _)]:
            if (operations[0].stack_dim, operations[0].concat_dim) == (0, 1):
                return _experts_of_sets(converter, target, whole, own)
        case [("Chunk" | "Split", 0)] if len(whole) == 1 and len(whole[0]) == 1:
            return _split(converter, target, whole[0][0], own)
    done = " and ".join(name for name, _ in kinds)
    raise _UnknownError(f"transformers changes it while loading ({done})")


def _turns_matrices(operation: Any, parameter: Any) -> bool:
    """Return whether a transposition is one of the last two dimensions of a parameter."""
    size = 0 if parameter is None else parameter.dim()
    return {operation.dim0, operation.dim1} == {size - 2, size - 1}


def _split(
    converter: Any, target: str, whole: Piece, own: Mapping[str, Any]
) -> dict[str, tuple[Piece, ...]]:
    """Return the parameters that one tensor is split into, each with its rows."""
    names = _all_targets(converter, target, own)
    found: dict[str, tuple[Piece, ...]] = {}
    start = 0
    for name in names:
        count = own[name].shape[0]
        found[name] = (Piece(whole.tensor, start, count),)
        start += count
    if start != whole.rows:
        raise _UnknownError("transformers splits it while loading")
    return found


def _experts_of_sets(
    converter: Any, target: str, whole: Sequence[Sequence[Piece]], own: Mapping[str, Any]
) -> dict[str, tuple[Piece, ...]]:
    """Return the parameters of sets of experts that are stored as one: first the first set's."""
    names = _all_targets(converter, target, own)
    sizes = {own[name].shape[0] for name in names}
    size = sizes.pop()
    if sizes:  # transformers makes sets of one size
        raise _UnknownError("transformers splits it while loading")
    if {len(group) for group in whole} != {len(names) * size}:
        raise _UnknownError("the experts of its block are not all stored")
    experts = list(zip(*whole, strict=True))
    return {
        name: tuple(piece for expert in experts[n * size : (n + 1) * size] for piece in expert)
        for n, name in enumerate(names)
    }


def _all_targets(converter: Any, target: str, own: Mapping[str, Any]) -> list[str]:
    """Return the parameters that a converter makes together, given the first.

    Raises:
        _UnknownError: If the model lacks one of them.
    """
    first = next((p for p in converter.target_patterns if p in target), None)
    names = [] if first is None else [target.replace(first, p) for p in converter.target_patterns]
    if not names or not all(name in own for name in names):
        raise _UnknownError("transformers splits it while loading")
    return names


def _whole(name: str, rows: Mapping[str, int]) -> Piece:
    return Piece(name, 0, rows[name])


def _natural(name: str) -> list[Any]:
    """Return a sort key that has expert 2 before expert 10, as transformers sorts."""
    return [int(part) if part.isdigit() else part for part in _DIGITS.split(name)]


def matrix_rows(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, int]:
    """Return the number of rows of tensors: all dimensions but the last, multiplied.

    A vector counts as a matrix of one column.

    Args:
        shapes: Names and shapes.
    """
    found = {}
    for name, shape in shapes:
        count = 1
        for size in shape[:-1] or shape:
            count *= size
        found[name] = count
    return found
