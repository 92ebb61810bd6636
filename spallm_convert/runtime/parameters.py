"""Find the sketches of a model, and the parameters that a set of tables may replace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spallm_convert.errors import OptionError
from spallm_formats import INDEX_MAP_SUFFIX, SCALE_ENDING, TABLE_ENDING

from .sketch import Sketch, Sketched, Span, affine_paths, is_sketched, table_path

#: The name of the original module inside a compiled module.
_COMPILED = "_orig_mod"


class Place(NamedTuple):
    """Say where a parameter is. Sharding puts another parameter into the same place.

    Attributes:
        module: The module that has the parameter.
        name: Name of the parameter in the module.
        is_table: Whether it holds sketch tables.
        is_affine: Whether it holds shifts or scales of tables.
    """

    module: nn.Module
    name: str
    is_table: bool = False
    is_affine: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        """Return the parameter that is there now."""
        found: nn.Parameter = getattr(self.module, self.name)
        return found

    @property
    def has_table_dtype(self) -> bool:
        """Return whether the parameter has the dtype of the tables."""
        return self.is_table or self.is_affine

    def identity(self) -> Tensor:
        """Return the shifts or scales with which tables stay as they are."""
        return torch.full_like(self.parameter, float(self.name.endswith(SCALE_ENDING))).detach()


class Pair(NamedTuple):
    """Say where the two parameters of a sketch are.

    Attributes:
        key: Name of the tables in a model: their name in the checkpoint if they are a tensor of it,
            otherwise their path.
        sketch: The sketch, which has at least one span.
        index_map: The place of the index map.
        table: The place of the tables.
    """

    key: str
    sketch: Sketch
    index_map: Place
    table: Place

    @property
    def affine_keys(self) -> tuple[str, str]:
        """Return the names of the shifts and the scales, whether the model has them or not."""
        shift, scale = affine_paths(self.key.removesuffix(TABLE_ENDING))
        return shift, scale

    @property
    def affine(self) -> dict[str, Place]:
        """Return the places of the shifts and the scales by name; empty if there are none."""
        owner, names = self.index_map.module, affine_paths(self.index_map.name)
        if getattr(owner, names[0], None) is None:
            return {}
        return {
            key: Place(owner, name, is_affine=True)
            for key, name in zip(self.affine_keys, names, strict=True)
        }


def sketched_model(model: nn.Module) -> Any:
    """Return the transformers model inside wrappers; raise OptionError if it is not sketched."""
    inner: Any = model
    while wrapped := _wrapped_by(inner):
        inner = wrapped
    if not any(map(is_sketched, inner.modules())):
        raise OptionError(
            f"{type(inner).__name__} has no sketched layers: load the model with load_sketched"
        )
    return inner


def sketched_pairs(model: nn.Module) -> list[Pair]:
    """Return the sketches of a model, with the places of their parameters.

    Tied sketches are one: the module that the checkpoint stores has it.
    """
    return _pairs(model, tied=False)


def all_pairs(model: nn.Module) -> list[Pair]:
    """Return the sketches of a model, with each one of tied sketches."""
    return _pairs(model, tied=False) + _pairs(model, tied=True)


def replaceable(model: nn.Module) -> dict[str, Place]:
    """Return the places of all parameters except the index maps, by name.

    Tables have their names in the checkpoint if they are a tensor of it. Other parameters have the
    names that they have in a model that is not compiled.
    """
    return dict(_places(model))


def _places(model: nn.Module) -> Iterator[tuple[str, Place]]:
    pairs = sketched_pairs(model)
    taken = {
        (id(place.module), place.name)
        for pair in all_pairs(model)
        for place in (pair.index_map, pair.table, *pair.affine.values())
    }
    seen: set[int] = set()  # tied weights are one parameter in several places
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or (id(module), name) in taken:
                continue
            seen.add(id(parameter))
            yield _uncompiled(f"{path}.{name}" if path else name), Place(module, name)
    for pair in pairs:
        yield pair.key, pair.table
        yield from pair.affine.items()


def _pairs(model: nn.Module, *, tied: bool) -> list[Pair]:
    return [
        _pair(path, module, inner, sketch)
        for path, module in model.named_modules()
        if isinstance(module, Sketched) and module.is_tied == tied
        for inner, sketch in module.sketches.items()
    ]


def _pair(path: str, module: Any, inner: str, sketch: Sketch) -> Pair:
    """Return the sketch of a module whose index map has the path `inner` in the module."""
    where = _uncompiled(f"{path}.{inner}" if path else inner)
    if not sketch.spans:  # made by hand
        span = Span.whole(where.removesuffix(INDEX_MAP_SUFFIX), sketch.shape)
        sketch = Sketch(sketch.shape, (span,), sketch.hash_seed)
    (first, *others) = sketch.spans
    key = table_path(where)
    if first.is_whole and not others:
        key = first.module.table_name(first.name)
    parent, _, name = inner.rpartition(".")
    owner = module.get_submodule(parent)
    return Pair(key, sketch, Place(owner, name), Place(owner, table_path(name), is_table=True))


def _uncompiled(name: str) -> str:
    return name.replace(f"{_COMPILED}.", "")


def _wrapped_by(model: Any) -> nn.Module | None:
    # A compiled model has all attributes of the model inside: only its modules tell them apart.
    compiled: nn.Module | None = model._modules.get(_COMPILED)
    if compiled is not None or hasattr(model, "hf_quantizer"):
        return compiled
    return getattr(model, "module", None)
