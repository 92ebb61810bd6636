"""Save sketch tables without their index maps, load them onto a base, and switch between sets.

A model keeps named sets of tables, and one set is active. The set "base" holds the tables that the
model was loaded with; loading another set never changes it.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spallm_convert.errors import FormatError, OptionError
from spallm_convert.paths import user_path
from spallm_formats import TABLES_FILE, TablesMetadata, shown

from .parameters import sketched_model
from .sharding import is_first_process, is_sharded, on_first_process, placed_like, whole
from .stored_modules import StoredModules
from .table_sets import BASE, TableSets
from .tables_file import DTYPES, StoredTables, find_tables, open_tables, write_tables

if TYPE_CHECKING:
    import os


def save_tables(
    model: nn.Module, folder: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Save the active tables and all other trainable parameters, without the index maps.

    If the process is killed, the folder holds the former tables or the new ones.

    If there are several processes, the first one writes. If parameters are sharded, every process
    must call this function; all return when the first is done, or raise its error. If parameters
    are not sharded (DDP), only the first process needs to call it, and others return at once.

    Args:
        model: A model from `load_sketched`, also inside DDP, FSDP2 or torch.compile.
        folder: Folder to write to. It is created if it does not exist.
        overwrite: Replace tables in the folder.

    Returns:
        The folder.

    Raises:
        OptionError: If the folder already holds tables and `overwrite` is False, something else has
            their name, the model has no sketched layers, or its weights are offloaded by
            `device_map`.
    """
    model = sketched_model(model)
    target = user_path(folder)
    portable = _portable(model)
    together = any(map(is_sharded, portable.values()))
    if not (together or is_first_process()):
        return target
    modules = StoredModules.of(model)
    metadata = _describe(model, modules.fingerprint())
    tensors = {}
    for name, parameter in portable.items():
        value = whole(parameter)  # in every process: gathering needs all of them
        if is_first_process():
            tensors[name] = value.cpu()
    if is_first_process():
        tables = {pair.key: tensors.pop(pair.key) for pair in modules.pairs}
        tensors |= modules.cut(tables)
    on_first_process(
        lambda: write_tables(target, tensors, metadata, overwrite=overwrite), together=together
    )
    return target


def load_tables(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    name: str = "tuned",
    revision: str | None = None,
    activate: bool = True,
) -> None:
    """Load a tables-only checkpoint as a set of tables of the model.

    All sets of a model have tables of one dtype, so that one optimizer can train any set. If the
    loaded tables are narrower than the model's, they are cast. If they are wider, the tables of all
    sets are cast and lose their gradients: make optimizers after that. No value is rounded. Norms
    and other parameters are cast to the dtype of the model. All tensors go to the device of the
    parameters that they replace. If an error is raised, the model is unchanged.

    Args:
        model: A model from `load_sketched`, also inside DDP, FSDP2 or torch.compile.
        source: The tables-only checkpoint: a folder or an id on the Hub.
        name: Name of the set, except "base". A set with this name is replaced.
        revision: Branch, tag or commit of `source` on the Hub. None: the default branch.
        activate: Make the set active. A set that replaces the active one is active in any case.

    Raises:
        FormatError: If the tables were made for other index maps, or do not fit. It has every
            problem.
        OptionError: If the name is "base", the model has no sketched layers, its weights are
            offloaded by `device_map`, or the model is sharded with tables in a narrower dtype.
        SourceError: If the tables cannot be found or downloaded.
    """
    model = sketched_model(model)
    if name == BASE:
        raise OptionError(
            f"the name {BASE!r} is reserved for the tables that the model was loaded with; choose "
            f"another name"
        )
    folder = find_tables(source, revision)
    modules = StoredModules.of(model)
    own = modules.fingerprint()
    sets = TableSets.of(model)
    with open_tables(folder) as stored:
        _check_base(stored.metadata, own, source)
        tensors = _read(stored, sets, modules)
    table_dtype = _common_dtype(sets, tensors)
    values = {}
    for key, tensor in tensors.items():
        place = sets.places[key]
        dtype = table_dtype if place.is_table else place.parameter.dtype
        values[key] = placed_like(tensor.to(dtype), place.parameter)
    sets.cast_tables(table_dtype)
    sets.add(name, values, activate=activate)


def set_tables(model: nn.Module, name: str = BASE) -> None:
    """Make a set of tables the active one, and drop the gradients of its parameters.

    Args:
        model: A model from `load_sketched`, also inside DDP, FSDP2 or torch.compile.
        name: Name of a set that `load_tables` loaded, or "base", the tables that the model was
            loaded with.

    Raises:
        OptionError: If the model has no set with this name, or no sketched layers.
    """
    sets = TableSets.of(sketched_model(model))
    if name not in sets.names:
        raise OptionError(
            f"no set of tables is called {name!r}, the model has {', '.join(sets.names)}; load it "
            f"with load_tables"
        )
    sets.activate(name)


def table_sets(model: nn.Module) -> list[str]:
    """Return the names of all sets of tables of a model.

    Args:
        model: A model from `load_sketched`, also inside DDP, FSDP2 or torch.compile.

    Returns:
        The names: the active set first, the others in alphabetical order. "base" is among them.

    Raises:
        OptionError: If the model has no sketched layers.
    """
    return TableSets.of(sketched_model(model)).names


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


def _portable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a tables-only checkpoint.

    These are all tables, other trainable parameters, and the parameters that were loaded with the
    active set.
    """
    sets = TableSets.of(model)
    carried = sets.carried
    return {
        name: place.parameter
        for name, place in sets.places.items()
        if place.is_table or place.parameter.requires_grad or name in carried
    }


def _describe(model: Any, fingerprint: str) -> TablesMetadata:
    origin = getattr(model.config, "_name_or_path", None) or None
    if origin is not None and Path(origin).exists():
        origin = Path(origin).resolve().name  # the path on this machine helps nobody else
    if origin is not None:  # a name of a folder may hold bytes that are not text
        origin = origin.encode(errors="replace").decode()
    return TablesMetadata(
        base_model=origin,
        base_revision=getattr(model.config, "_commit_hash", None),
        fingerprint=fingerprint,
    )


def _check_base(metadata: TablesMetadata, own: str, source: str | os.PathLike[str]) -> None:
    if metadata.fingerprint != own:
        base = "a base" if metadata.base_model is None else shown(metadata.base_model)[1:-1]
        raise FormatError(
            f"{source}: made for {base} with the index maps {metadata.fingerprint[:12]}, but this "
            f"model has {own[:12]}; load the model that the tables were trained on"
        )


def _read(stored: StoredTables, sets: TableSets, modules: StoredModules) -> dict[str, Tensor]:
    """Read all tensors, and join tables. Before that, check each against the model's shapes."""
    tables = modules.table_shapes()
    places = {name: place for name, place in sets.places.items() if not place.is_table}
    expected = {name: tuple(place.parameter.shape) for name, place in places.items()} | tables
    problems = [f"{name} is missing" for name in sorted(tables.keys() - stored.tensors.keys())]
    for name, spec in stored.tensors.items():
        if name not in expected:
            problems.append(f"{shown(name)}: the model has no such parameter")
        elif spec.shape != expected[name]:
            found, wanted = list(spec.shape), list(expected[name])
            problems.append(f"{name} has the shape {found}, the model expects {wanted}")
        elif spec.dtype not in DTYPES:
            problems.append(f"{name} is {spec.dtype}, expected one of {', '.join(DTYPES)}")
    kinds = {stored.tensors[name].dtype for name in tables.keys() & stored.tensors.keys()}
    if len(kinds) > 1:
        problems.append(f"tables have several dtypes, expected one: {', '.join(sorted(kinds))}")
    tensors = {} if problems else {name: stored.read(name) for name in stored.tensors}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            problems.append(f"{name} has values that are not finite")
    if problems:
        raise FormatError([f"{TABLES_FILE}: {problem}" for problem in problems])
    others = {name: tensor for name, tensor in tensors.items() if name not in tables}
    return others | modules.join(tensors.__getitem__)


def _common_dtype(sets: TableSets, tensors: dict[str, Tensor]) -> torch.dtype:
    """Return the dtype that holds every value of the model's tables and of loaded ones."""
    name = next(name for name, place in sets.places.items() if place.is_table)
    loaded, present = tensors[name].dtype, sets.table_dtype
    common = torch.promote_types(loaded, present)
    if common != present and is_sharded(sets.places[name].parameter):
        raise OptionError(
            f"the tables are {loaded}, but the model is sharded with tables in {present}, which "
            f"would round them; call set_trainable(model) before the model is sharded"
        )
    return common
