"""Save sketch tables without their index maps, load them onto a base, and switch between sets.

A model keeps named sets of tables, and one set is active. The set "base" holds the tables that the
model was loaded with; loading another set never changes it.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from spallm_convert.errors import OptionError
from spallm_convert.paths import user_path

from .affine import add_affine, check_affine_possible, is_saved_affine
from .parameters import sketched_model
from .sharding import is_first_process, is_sharded, on_first_process, placed_like, whole
from .stored_modules import StoredModules
from .table_sets import BASE, TableSets
from .tables_contents import as_stored, check_base, common_dtype, describe, portable, read_tensors
from .tables_file import find_tables, open_tables, write_tables

if TYPE_CHECKING:
    import os


def save_tables(
    model: nn.Module, folder: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Save the active tables and all other trainable parameters, without the index maps.

    If the active set is affine, its shifts and scales are saved in place of tables. So they are if
    "base" is active, its shifts and scales are trained or were, and its tables are frozen. If a set
    has tables of its own and is affine too, the tables that result are saved.

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
    sets, modules = TableSets.of(model), StoredModules.of(model)
    together = any(map(is_sharded, model.parameters()))
    if not (together or is_first_process()):
        return target
    affine = is_saved_affine(sets)
    base_tables = modules.tables_digest(sets.base_value) if affine else None
    metadata = describe(model, modules.fingerprint(), base_tables)
    tensors = {}
    for name, parameter in portable(sets, affine=affine).items():
        value = whole(parameter)  # in every process: gathering needs all of them
        if is_first_process():
            tensors[name] = value.cpu()
    if is_first_process():
        tensors = as_stored(modules, tensors, affine=affine)
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

    An affine checkpoint makes an affine set, whose shifts and scales apply to the base's tables. If
    an affine set becomes active, tables that were trainable are frozen, and the set's shifts and
    scales become trainable instead; a set with tables of its own reverses this.

    Args:
        model: A model from `load_sketched`, also inside DDP, FSDP2 or torch.compile.
        source: The tables-only checkpoint: a folder or an id on the Hub.
        name: Name of the set, except "base". A set with this name is replaced.
        revision: Branch, tag or commit of `source` on the Hub. None: the default branch.
        activate: Make the set active. A set that replaces the active one is active in any case.

    Raises:
        FormatError: If the tables were made for other index maps, or do not fit, or an affine set
            was made for other tables. It has every problem.
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
    sets, modules = TableSets.of(model), StoredModules.of(model)
    with open_tables(folder) as stored:
        check_base(stored.metadata, modules, sets, source)
        tensors = read_tensors(stored, sets, modules)
    table_dtype = common_dtype(sets, modules, tensors)
    if stored.metadata.is_affine:
        check_affine_possible(sets)
        sets = add_affine(model)
    values = {}
    for key, tensor in tensors.items():
        place = sets.places[key]
        dtype = table_dtype if place.has_table_dtype else place.parameter.dtype
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
