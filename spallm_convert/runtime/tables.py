"""Sketch tables apart from their index maps: saved alone, loaded onto a base, several kept at once.

A model keeps named sets of tables. The set called "base" is what it was loaded with and is never
changed by loading another; one set is active. Changing sets exchanges the storage of parameters, so
that it takes milliseconds, and optimizers and hooks keep the parameters that they know. Sharded
parameters keep storage and dtype, and get copies of the values.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from spallm_convert.errors import FormatError, OptionError, SourceError
from spallm_convert.paths import user_path
from spallm_convert.source.hub import download_tables
from spallm_formats import (
    TABLE_SUFFIX,
    TABLES_FILE,
    TABLES_METADATA_FILE,
    TablesMetadata,
    fingerprint,
    load_json,
    map_digest,
    to_json,
)
from spallm_formats.durable import flush_folder, write_atomic

from .linear import SketchedLinear

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

BASE = "base"

#: What a compiled module calls the one that it is made of.
_COMPILED = "_orig_mod"


@dataclass
class _Sets:
    """Every set of a model, by name and parameter, and which one its parameters share storage with.

    "base" has a value for whatever any set replaces.
    """

    active: str = BASE
    stored: dict[str, dict[str, Tensor]] = field(default_factory=lambda: {BASE: {}})


_digests: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


def save_tables(
    model: nn.Module, folder: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Saves the active tables, and what else of the model is trainable, without its index maps.

    model: a sketched transformers model, also inside DDP, FSDP2 or torch.compile. Of several
    processes the first writes; where parameters are sharded all have to call, and the others return
    when the first is done. Returns the folder. Raises OptionError when there are tables in it
    already and `overwrite` is off.
    """
    model = sketched_model(model)
    target = user_path(folder)
    metadata = _describe(model)
    portable = _portable(model)
    tensors = {name: _whole(value).contiguous().cpu() for name, value in portable.items()}
    try:
        if not _distributed() or torch.distributed.get_rank() == 0:
            _write(target, tensors, metadata, overwrite=overwrite)
    finally:
        if _distributed() and any(map(_is_sharded, portable.values())):
            torch.distributed.barrier()
    return target


def _describe(model: Any) -> TablesMetadata:
    origin = getattr(model.config, "_name_or_path", None) or None
    if origin is not None and Path(origin).exists():
        origin = Path(origin).resolve().name  # not where it lies on this machine
    return TablesMetadata(
        base_model=origin,
        base_revision=getattr(model.config, "_commit_hash", None),
        fingerprint=model_fingerprint(model),
    )


def _write(
    target: Path, tensors: dict[str, Tensor], metadata: TablesMetadata, *, overwrite: bool
) -> None:
    if (target / TABLES_METADATA_FILE).exists() and not overwrite:
        raise OptionError(f"{target} holds sketch tables already; overwrite=True replaces them")
    target.mkdir(parents=True, exist_ok=True)
    # The description comes last and goes first: without it, a folder holds no tables.
    (target / TABLES_METADATA_FILE).unlink(missing_ok=True)
    write_atomic(target / TABLES_FILE, save(tensors, metadata={"format": "pt"}))
    write_atomic(target / TABLES_METADATA_FILE, to_json(metadata.to_json()))
    flush_folder(target)


def load_tables(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    name: str = "tuned",
    revision: str | None = None,
    activate: bool = True,
) -> None:
    """Loads tables from a folder or the Hub as a set of the model, and makes it the active one.

    Tables keep the dtype they were saved in and go to the device of those they replace; norms and
    all else take the model's dtype, as everything does in a sharded model. A set of the same name
    is replaced.
    Raises FormatError, listing every problem, when they were made for other index maps or do not
    fit, and leaves the model as it was then; OptionError for a model whose weights are not in
    memory, offloaded by `device_map`.
    """
    model = sketched_model(model)
    if name == BASE:
        raise OptionError(f"the name {BASE!r} is that of the tables the model came with")
    folder = _find(source, revision)
    described = folder / TABLES_METADATA_FILE
    metadata = TablesMetadata.from_json(load_json(described.read_bytes(), described.name))
    own = model_fingerprint(model)
    if metadata.fingerprint != own:
        raise FormatError(
            f"{source}: made for {metadata.base_model or 'a base'} with index maps "
            f"{metadata.fingerprint[:12]}, this model has {own[:12]}"
        )
    tensors, parameters = _read(folder / TABLES_FILE, model), _replaceable(model)
    sets = _sets(model)
    was_active = sets.active == name
    if was_active:
        _activate(model, BASE)
    for key in tensors:  # where the base has no value yet, no set has replaced it
        sets.stored[BASE].setdefault(key, _current(parameters[key]))
    sets.stored[name] = tensors
    if activate or was_active:
        _activate(model, name)


def set_tables(model: nn.Module, name: str = BASE) -> None:
    """Makes a set of tables the active one. Gradients of the tables are dropped.

    Raises OptionError when the model has no set of that name.
    """
    model = sketched_model(model)
    known = table_sets(model)
    if name not in known:
        raise OptionError(f"no set of tables is called {name!r}; there are {', '.join(known)}")
    _activate(model, name)


def table_sets(model: nn.Module) -> list[str]:
    """Names of the sets that a model has, the active one first."""
    sets = _sets(sketched_model(model))
    return [sets.active, *sorted(sets.stored.keys() - {sets.active})]


def sketched_model(model: nn.Module) -> Any:
    """The transformers model inside wrappers; raises OptionError when it is not sketched."""
    inner: Any = model
    while wrapped := _wrapped_by(inner):
        inner = wrapped
    if not any(isinstance(module, SketchedLinear) for module in inner.modules()):
        raise OptionError(f"{type(inner).__name__} has no sketched layers")
    return inner


def _wrapped_by(model: Any) -> nn.Module | None:
    # A compiled model has all attributes of the one in it: only its modules tell them apart.
    compiled: nn.Module | None = model._modules.get(_COMPILED)
    if compiled is not None or hasattr(model, "hf_quantizer"):
        return compiled
    return getattr(model, "module", None)


def sketched_layers(model: nn.Module) -> dict[str, SketchedLinear]:
    """The sketched layers of a model by the names they have on disk."""
    return {
        layer.stored_name or path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, SketchedLinear)
    }


def model_fingerprint(model: nn.Module) -> str:
    """Fingerprint of a model's index maps, as formats/SPEC.md defines it.

    Reads every index map once, at about the speed of SHA-256; later calls remember.
    """
    layers = sketched_layers(model)
    return fingerprint(
        {name: layer.shape for name, layer in layers.items()},
        {name: _digest(layer) for name, layer in layers.items()},
    )


def attach_set_tables(model: nn.Module) -> None:
    """Gives a loaded model `set_tables` as a method.

    Its class gets it: with an attribute that refers back to it the model would not be freed when it
    is no longer used, but some time later.
    """
    type(model).set_tables = set_tables  # type: ignore[attr-defined]


def keep_apart(model: nn.Module) -> None:
    """Gives the active set values of its own for all that is trained with it, so that training one
    set changes no other."""
    sets = _sets(model)
    if sets.active == BASE:
        return
    for key, parameter in _replaceable(model).items():
        if parameter.requires_grad and key not in sets.stored[sets.active]:
            sets.stored[BASE].setdefault(key, _current(parameter))
            own = sets.stored[sets.active][key] = parameter.detach().clone()
            _replace(parameter, own)


def _digest(layer: SketchedLinear) -> str:
    if layer.weight_table.is_meta:
        raise OptionError(
            f"{layer.stored_name} is not in memory but offloaded (device_map): tables are saved "
            f"and loaded for models that are in memory as a whole"
        )
    if layer.hash_seed is not None:
        return map_digest(None, layer.hash_seed)
    state = (layer.weight.data_ptr(), layer.weight._version)
    known = _digests.get(layer)
    if known is None or known[0] != state:
        # Not `Tensor.numpy`, after which FSDP2 could not free the memory that it has gathered.
        packed = np.from_dlpack(_whole(layer.weight).cpu().contiguous())
        known = _digests[layer] = (state, map_digest(packed, None))
    return known[1]


def _portable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a tables-only checkpoint holds: all tables, other parameters that are trained, and those
    that came with the active set."""
    found = {
        name + TABLE_SUFFIX: layer.weight_table for name, layer in sketched_layers(model).items()
    }
    tables = set(map(id, found.values()))
    sets = _sets(model)
    carried = sets.stored[sets.active] if sets.active != BASE else {}
    for name, parameter in _named_parameters(model):
        if id(parameter) not in tables and (parameter.requires_grad or name in carried):
            found[name] = parameter
    return found


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the names that they have where no part of the model is compiled."""
    for name, parameter in model.named_parameters():
        yield name.replace(f"{_COMPILED}.", ""), parameter


def _read(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a tables file, each checked against the parameter that it is for."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: cannot be read: {error}") from error
    parameters = _replaceable(model)
    tables = {name + TABLE_SUFFIX for name in sketched_layers(model)}
    problems = [f"{name} is missing" for name in sorted(tables - tensors.keys())]
    for name, tensor in tensors.items():
        if name not in parameters:
            problems.append(f"{name}: the model has no such parameter")
        elif tensor.shape != parameters[name].shape:
            found, expected = list(tensor.shape), list(parameters[name].shape)
            problems.append(f"{name} has shape {found}, the model's has {expected}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype}, expected a floating-point dtype")
        elif not tensor.isfinite().all():
            problems.append(f"{name} holds values that are not finite")
    kinds = {str(tensors[name].dtype) for name in tables & tensors.keys()}
    if len(kinds) > 1:
        problems.append(f"tables are of several dtypes: {', '.join(sorted(kinds))}")
    if problems:
        raise FormatError([f"{path.name}: {problem}" for problem in problems])
    return {
        name: _like(tensor, parameters[name], keep_dtype=name in tables)
        for name, tensor in tensors.items()
    }


def _replaceable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that a set may replace: by their names on disk, all but the index maps."""
    layers = sketched_layers(model)
    own = {id(value) for layer in layers.values() for value in (layer.weight, layer.weight_table)}
    found = {name: value for name, value in _named_parameters(model) if id(value) not in own}
    return found | {name + TABLE_SUFFIX: layer.weight_table for name, layer in layers.items()}


def _activate(model: nn.Module, name: str) -> None:
    sets, parameters = _sets(model), _replaceable(model)
    concerned, base = {key for one in sets.stored.values() for key in one}, sets.stored[BASE]
    for key in sets.stored[sets.active]:  # storage may have moved, with the model to a device
        sets.stored[sets.active][key] = _current(parameters[key])
    for key in concerned:
        _replace(parameters[key], sets.stored[name].get(key, base[key]))
    sets.active = name
    keep_apart(model)


def _current(parameter: nn.Parameter) -> Tensor:
    """The value of a parameter, to be put back later."""
    value = parameter.detach()
    return value.clone() if _is_sharded(parameter) else value


def _replace(parameter: nn.Parameter, value: Tensor) -> None:
    """Gives a parameter the storage of a value, or, where it is sharded, a copy."""
    if _is_sharded(parameter):
        with torch.no_grad():
            parameter.copy_(value)
    else:
        parameter.data = value.to(parameter.device)
    parameter.grad = None


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _sets(model: nn.Module) -> _Sets:
    sets: _Sets = model.__dict__.setdefault("_sketch_table_sets", _Sets())
    return sets


def _whole(value: Tensor) -> Tensor:
    """A tensor in one piece, gathered from all processes where it is sharded."""
    detached: Any = value.detach()
    whole: Tensor = detached.full_tensor() if _is_sharded(detached) else detached
    return whole


def _like(tensor: Tensor, parameter: Tensor, *, keep_dtype: bool) -> Tensor:
    """A tensor placed (and sharded) as a parameter is, of the parameter's dtype unless it is to
    keep its own."""
    tensor = tensor if keep_dtype else tensor.to(parameter.dtype)
    if _is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        placed: Any = parameter
        return distribute_tensor(tensor, placed.device_mesh, placed.placements)
    return tensor.to(parameter.device)


def _find(source: str | os.PathLike[str], revision: str | None) -> Path:
    """The folder of a tables-only checkpoint, downloaded where it is an id on the Hub."""
    folder = user_path(source)
    if not folder.is_dir():
        if folder.exists() or str(source).startswith((".", "/", "~")):
            raise SourceError(f"no such folder: {source}")
        folder = download_tables(str(source), revision)
    missing = [
        name for name in (TABLES_METADATA_FILE, TABLES_FILE) if not (folder / name).is_file()
    ]
    if missing:
        raise FormatError(f"{source} holds no sketch tables: {', '.join(missing)} missing")
    return folder
