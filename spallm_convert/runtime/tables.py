"""Save sketch tables without their index maps, load them onto a base, and switch between sets.

A model keeps named sets of tables, and one set is active. The set "base" holds the tables that the
model was loaded with; loading another set never changes it. Switching exchanges the storage of
parameters: it takes milliseconds, and the parameters that optimizers and hooks know stay valid.
Sharded parameters keep their storage and dtype, and get copies of the values.
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

#: The name of the original module inside a compiled module.
_COMPILED = "_orig_mod"


@dataclass
class _Sets:
    """Hold every set of a model, by name and parameter.

    The model's parameters share storage with the active set. "base" has a value for every parameter
    that any set replaces.
    """

    active: str = BASE
    stored: dict[str, dict[str, Tensor]] = field(default_factory=lambda: {BASE: {}})


_digests: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


def save_tables(
    model: nn.Module, folder: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Save the active tables and all other trainable parameters, without the index maps.

    If there are several processes, the first one writes. If parameters are sharded, every process
    must call this function; the others return when the first is done.

    Args:
        model: A model from `load_sketched`, also inside DDP, FSDP2 or torch.compile.
        folder: Folder to write to. It is created if it does not exist.
        overwrite: Replace tables in the folder.

    Returns:
        The folder.

    Raises:
        OptionError: If the folder already holds tables and `overwrite` is False, the model has no
            sketched layers, or its weights are offloaded by `device_map`.
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
        origin = Path(origin).resolve().name  # the path on this machine helps nobody else
    return TablesMetadata(
        base_model=origin,
        base_revision=getattr(model.config, "_commit_hash", None),
        fingerprint=model_fingerprint(model),
    )


def _write(
    target: Path, tensors: dict[str, Tensor], metadata: TablesMetadata, *, overwrite: bool
) -> None:
    if (target / TABLES_METADATA_FILE).exists() and not overwrite:
        raise OptionError(f"{target} already holds sketch tables; overwrite=True replaces them")
    target.mkdir(parents=True, exist_ok=True)
    # A folder without the description holds no tables: remove it first and write it last.
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
    """Load a tables-only checkpoint as a set of tables of the model.

    Tables keep the dtype that they were saved in. Norms and other parameters are cast to the dtype
    of the model; in a sharded model, tables are too. All tensors go to the device of the parameters
    that they replace. If an error is raised, the model is unchanged.

    Args:
        model: A model from `load_sketched`, also inside DDP, FSDP2 or torch.compile.
        source: The tables-only checkpoint: a folder or an id on the Hub.
        name: Name of the set, except "base". A set with this name is replaced.
        revision: Branch, tag or commit of `source` on the Hub. None: the default branch.
        activate: Make the set active. A set that replaces the active one is active in any case.

    Raises:
        FormatError: If the tables were made for other index maps, or do not fit. It lists every
            problem.
        OptionError: If the name is "base", the model has no sketched layers, or its weights are
            offloaded by `device_map`.
        SourceError: If the tables cannot be found or downloaded.
    """
    model = sketched_model(model)
    if name == BASE:
        raise OptionError(
            f"the name {BASE!r} is reserved for the tables that the model was loaded with; choose "
            f"another name"
        )
    folder = _find(source, revision)
    described = folder / TABLES_METADATA_FILE
    metadata = TablesMetadata.from_json(load_json(described.read_bytes(), described.name))
    own = model_fingerprint(model)
    if metadata.fingerprint != own:
        raise FormatError(
            f"{source}: made for {metadata.base_model or 'a base'} with the index maps "
            f"{metadata.fingerprint[:12]}, but this model has {own[:12]}; load the model that the "
            f"tables were trained on"
        )
    tensors, parameters = _read(folder / TABLES_FILE, model), _replaceable(model)
    sets = _sets(model)
    was_active = sets.active == name
    if was_active:
        _activate(model, BASE)
    for key in tensors:  # if the base has no value yet, no set has replaced the parameter
        sets.stored[BASE].setdefault(key, _current(parameters[key]))
    sets.stored[name] = tensors
    if activate or was_active:
        _activate(model, name)


def set_tables(model: nn.Module, name: str = BASE) -> None:
    """Make a set of tables the active one, and drop the gradients of its parameters.

    Args:
        model: A model from `load_sketched`, also inside DDP, FSDP2 or torch.compile.
        name: Name of a set that `load_tables` loaded, or "base", the tables that the model was
            loaded with.

    Raises:
        OptionError: If the model has no set with this name, or no sketched layers.
    """
    model = sketched_model(model)
    known = table_sets(model)
    if name not in known:
        raise OptionError(
            f"no set of tables is called {name!r}, the model has {', '.join(known)}; load it with "
            f"load_tables"
        )
    _activate(model, name)


def table_sets(model: nn.Module) -> list[str]:
    """Return the names of all sets of tables of a model.

    Args:
        model: A model from `load_sketched`, also inside DDP, FSDP2 or torch.compile.

    Returns:
        The names: the active set first, the others in alphabetical order. "base" is among them.

    Raises:
        OptionError: If the model has no sketched layers.
    """
    sets = _sets(sketched_model(model))
    return [sets.active, *sorted(sets.stored.keys() - {sets.active})]


def sketched_model(model: nn.Module) -> Any:
    """Return the transformers model inside wrappers; raise OptionError if it is not sketched."""
    inner: Any = model
    while wrapped := _wrapped_by(inner):
        inner = wrapped
    if not any(isinstance(module, SketchedLinear) for module in inner.modules()):
        raise OptionError(
            f"{type(inner).__name__} has no sketched layers: load the model with load_sketched"
        )
    return inner


def _wrapped_by(model: Any) -> nn.Module | None:
    # A compiled model has all attributes of the model inside: only its modules tell them apart.
    compiled: nn.Module | None = model._modules.get(_COMPILED)
    if compiled is not None or hasattr(model, "hf_quantizer"):
        return compiled
    return getattr(model, "module", None)


def sketched_layers(model: nn.Module) -> dict[str, SketchedLinear]:
    """Return the sketched layers of a model by their names in the checkpoint."""
    return {
        layer.stored_name or path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, SketchedLinear)
    }


def model_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of a model's index maps, as formats/SPEC.md defines it.

    The first call reads every index map, at about the speed of SHA-256. Later calls use a cache.
    """
    layers = sketched_layers(model)
    return fingerprint(
        {name: layer.shape for name, layer in layers.items()},
        {name: _digest(layer) for name, layer in layers.items()},
    )


def attach_set_tables(model: nn.Module) -> None:
    """Give a loaded model the method `set_tables`. Other models of its class do not get it."""
    model.set_tables = _SetTables(model)  # type: ignore[assignment]


class _SetTables:
    """Call `set_tables` for one model, as its attribute, without keeping the model alive.

    A bound method would refer back to the model, and delay freeing the model's memory until the
    next garbage collection. A copied or unpickled model gets its own object.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self, name: str = BASE) -> None:
        set_tables(self._living(), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _SetTables:
        model = self._living()
        return _SetTables(memo.get(id(model), model))  # the copy is there before its attributes are

    def __reduce__(self) -> tuple[type[_SetTables], tuple[nn.Module]]:
        return _SetTables, (self._living(),)

    def _living(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise OptionError("the model of this set_tables is gone; keep a reference to the model")
        return model


def keep_apart(model: nn.Module) -> None:
    """Give the active set its own copy of every trainable parameter.

    So training one set changes no other set.
    """
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
            f"{layer.stored_name} is offloaded (device_map), but tables are saved and loaded only "
            f"if the whole model is in memory: load it without device_map"
        )
    if layer.hash_seed is not None:
        return map_digest(None, layer.hash_seed)
    state = (layer.weight.data_ptr(), layer.weight._version)
    known = _digests.get(layer)
    if known is None or known[0] != state:
        # Not `Tensor.numpy`: after that call FSDP2 could not free the gathered memory.
        packed = np.from_dlpack(_whole(layer.weight).cpu().contiguous())
        known = _digests[layer] = (state, map_digest(packed, None))
    return known[1]


def _portable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a tables-only checkpoint.

    These are all tables, other trainable parameters, and the parameters that were loaded with the
    active set.
    """
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
    """Yield parameters by the names that they have in a model that is not compiled."""
    for name, parameter in model.named_parameters():
        yield name.replace(f"{_COMPILED}.", ""), parameter


def _read(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Read the tensors of a tables file, and check each against the parameter that it replaces."""
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
            problems.append(f"{name} has the shape {found}, the model expects {expected}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype}, expected a floating-point dtype")
        elif not tensor.isfinite().all():
            problems.append(f"{name} has values that are not finite")
    kinds = {str(tensors[name].dtype) for name in tables & tensors.keys()}
    if len(kinds) > 1:
        problems.append(f"tables have several dtypes, expected one: {', '.join(sorted(kinds))}")
    if problems:
        raise FormatError([f"{path.name}: {problem}" for problem in problems])
    return {
        name: _like(tensor, parameters[name], keep_dtype=name in tables)
        for name, tensor in tensors.items()
    }


def _replaceable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a set may replace, by name: all except the index maps."""
    layers = sketched_layers(model)
    own = {id(value) for layer in layers.values() for value in (layer.weight, layer.weight_table)}
    found = {name: value for name, value in _named_parameters(model) if id(value) not in own}
    return found | {name + TABLE_SUFFIX: layer.weight_table for name, layer in layers.items()}


def _activate(model: nn.Module, name: str) -> None:
    sets, parameters = _sets(model), _replaceable(model)
    replaced, base = {key for one in sets.stored.values() for key in one}, sets.stored[BASE]
    for key in sets.stored[sets.active]:  # moving the model to a device gives it new storage
        sets.stored[sets.active][key] = _current(parameters[key])
    for key in replaced:
        _replace(parameters[key], sets.stored[name].get(key, base[key]))
    sets.active = name
    keep_apart(model)


def _current(parameter: nn.Parameter) -> Tensor:
    """Return the value of a parameter, to be restored later."""
    value = parameter.detach()
    return value.clone() if _is_sharded(parameter) else value


def _replace(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter the storage of a value, or a copy of the value if it is sharded."""
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
    """Return the whole tensor, gathered from all processes if it is sharded."""
    detached: Any = value.detach()
    whole: Tensor = detached.full_tensor() if _is_sharded(detached) else detached
    return whole


def _like(tensor: Tensor, parameter: Tensor, *, keep_dtype: bool) -> Tensor:
    """Move (and shard) a tensor like a parameter; cast it unless it is to keep its dtype."""
    tensor = tensor if keep_dtype else tensor.to(parameter.dtype)
    if _is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        placed: Any = parameter
        return distribute_tensor(tensor, placed.device_mesh, placed.placements)
    return tensor.to(parameter.device)


def _find(source: str | os.PathLike[str], revision: str | None) -> Path:
    """Return the folder of a tables-only checkpoint, downloaded if it is an id on the Hub."""
    folder = user_path(source)
    if not folder.is_dir():
        if folder.exists() or str(source).startswith((".", "/", "~")):
            raise SourceError(f"no such folder: {source}")
        folder = download_tables(str(source), revision)
    missing = [
        name for name in (TABLES_METADATA_FILE, TABLES_FILE) if not (folder / name).is_file()
    ]
    if missing:
        raise FormatError(
            f"{source} holds no sketch tables: {', '.join(missing)} missing; save_tables writes "
            f"{'them' if len(missing) > 1 else 'it'}"
        )
    return folder
