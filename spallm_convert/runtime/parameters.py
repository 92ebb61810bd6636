"""Find the sketched layers of a model, and the parameters that a set of tables may replace."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from spallm_convert.errors import OptionError
from spallm_formats import TABLE_SUFFIX, fingerprint, map_digest

from .embedding import SketchedEmbedding
from .linear import SketchedLinear
from .sharding import whole

#: The kinds of sketched layers.
SKETCHED = (SketchedLinear, SketchedEmbedding)
#: The name of the original module inside a compiled module.
_COMPILED = "_orig_mod"

_digests: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


class Place(NamedTuple):
    """Say where a parameter is. Sharding puts another parameter into the same place."""

    module: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        """Return the parameter that is there now."""
        found: nn.Parameter = getattr(self.module, self.name)
        return found

    @property
    def is_table(self) -> bool:
        """Return whether it holds sketch tables."""
        return isinstance(self.module, SKETCHED) and self.name == "weight_table"

    @property
    def is_index_map(self) -> bool:
        """Return whether it holds an index map."""
        return isinstance(self.module, SKETCHED) and self.name == "weight"


def sketched_model(model: nn.Module) -> Any:
    """Return the transformers model inside wrappers; raise OptionError if it is not sketched."""
    inner: Any = model
    while wrapped := _wrapped_by(inner):
        inner = wrapped
    if not any(isinstance(module, SKETCHED) for module in inner.modules()):
        raise OptionError(
            f"{type(inner).__name__} has no sketched layers: load the model with load_sketched"
        )
    return inner


def sketched_layers(model: nn.Module) -> dict[str, SketchedLinear | SketchedEmbedding]:
    """Return the sketched layers of a model by their names in the checkpoint.

    Layers that are tied to another one are left out.
    """
    return {
        layer.stored_name or _uncompiled(path): layer
        for path, layer in model.named_modules()
        if isinstance(layer, SKETCHED) and not layer.is_tied
    }


def replaceable(model: nn.Module) -> dict[str, Place]:
    """Return the places of all parameters except the index maps, by name.

    Tables have their names in the checkpoint. Other parameters have the names that they have in a
    model that is not compiled.
    """
    return dict(_places(model))


def model_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of a model's index maps, as formats/SPEC.md defines it.

    The first call reads every index map, at about the speed of SHA-256. Later calls use a cache.
    """
    layers = sketched_layers(model)
    return fingerprint(
        {name: layer.shape for name, layer in layers.items()},
        {name: _digest(layer) for name, layer in layers.items()},
    )


def _places(model: nn.Module) -> Iterator[tuple[str, Place]]:
    seen: set[int] = set()  # tied weights are one parameter in several places
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            place = Place(module, name)
            if id(parameter) in seen or place.is_index_map or place.is_table:
                continue
            seen.add(id(parameter))
            yield _uncompiled(f"{path}.{name}" if path else name), place
    for path, layer in sketched_layers(model).items():
        yield path + TABLE_SUFFIX, Place(layer, "weight_table")


def _uncompiled(name: str) -> str:
    return name.replace(f"{_COMPILED}.", "")


def _wrapped_by(model: Any) -> nn.Module | None:
    # A compiled model has all attributes of the model inside: only its modules tell them apart.
    compiled: nn.Module | None = model._modules.get(_COMPILED)
    if compiled is not None or hasattr(model, "hf_quantizer"):
        return compiled
    return getattr(model, "module", None)


def _digest(layer: SketchedLinear | SketchedEmbedding) -> str:
    if layer.weight_table.is_meta:
        raise OptionError(
            f"{layer.stored_name} is offloaded (device_map), but tables are saved and loaded only "
            f"if the whole model is in memory: load it without device_map"
        )
    if layer.hash_seed is not None:
        return map_digest(None, layer.hash_seed)
    state = (layer.weight.data_ptr(), layer.weight._version)
    known = _digests.get(layer)
    if known is None or known[0] != state:
        # Not `Tensor.numpy`: after that call FSDP2 could not free the gathered memory.
        packed = np.from_dlpack(whole(layer.weight).cpu().contiguous())
        known = _digests[layer] = (state, map_digest(packed, None))
    return known[1]
