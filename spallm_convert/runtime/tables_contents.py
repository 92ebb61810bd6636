"""Collect what a tables-only checkpoint holds, and check what one holds against a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spallm_convert.errors import FormatError, OptionError
from spallm_formats import TABLES_FILE, TablesMetadata, shown

from .affine import with_affine
from .sharding import is_sharded
from .stored_modules import StoredModules
from .table_sets import TableSets
from .tables_file import DTYPES, StoredTables

if TYPE_CHECKING:
    import os


def portable(sets: TableSets, *, affine: bool) -> dict[str, nn.Parameter]:
    """Return the parameters of a tables-only checkpoint.

    These are all tables with their shifts and scales, other trainable parameters, and the
    parameters that were loaded with the active set. An affine checkpoint leaves the tables out.

    Args:
        sets: The sets of the model.
        affine: Whether the checkpoint is affine.
    """
    carried = sets.carried
    return {
        name: place.parameter
        for name, place in sets.places.items()
        if place.is_affine
        or (not affine if place.is_table else place.parameter.requires_grad or name in carried)
    }


def as_stored(
    modules: StoredModules, tensors: dict[str, Tensor], *, affine: bool
) -> dict[str, Tensor]:
    """Return the tensors of a tables-only checkpoint.

    Args:
        modules: The stored modules of the model.
        tensors: The values of the parameters from `portable`.
        affine: Whether the checkpoint is affine.
    """
    if affine:
        cut = modules.cut_affine(tensors)
    else:
        cut = modules.cut(with_affine(modules.pairs, tensors))
    joined = {key for pair in modules.pairs for key in (pair.key, *pair.affine_keys)}
    return {name: value for name, value in tensors.items() if name not in joined} | cut


def describe(model: Any, fingerprint: str, base_tables: str | None) -> TablesMetadata:
    """Return the description of a tables-only checkpoint.

    Args:
        model: The model.
        fingerprint: Fingerprint of its index maps.
        base_tables: Digest of the base's tables if the checkpoint is affine, else None.
    """
    origin = getattr(model.config, "_name_or_path", None) or None
    if origin is not None and Path(origin).exists():
        origin = Path(origin).resolve().name  # the path on this machine helps nobody else
    if origin is not None:  # a name of a folder may hold bytes that are not text
        origin = origin.encode(errors="replace").decode()
    return TablesMetadata(
        base_model=origin,
        base_revision=getattr(model.config, "_commit_hash", None),
        fingerprint=fingerprint,
        base_tables=base_tables,
    )


def check_base(
    metadata: TablesMetadata,
    modules: StoredModules,
    sets: TableSets,
    source: str | os.PathLike[str],
) -> None:
    """Raise FormatError if a tables-only checkpoint is not for the base of a model.

    Args:
        metadata: The description of the checkpoint.
        modules: The stored modules of the model.
        sets: The sets of the model.
        source: Where the checkpoint comes from.
    """
    own = modules.fingerprint()
    base = "a base" if metadata.base_model is None else shown(metadata.base_model)[1:-1]
    if metadata.fingerprint != own:
        raise FormatError(
            f"{source}: made for {base} with the index maps {metadata.fingerprint[:12]}, but this "
            f"model has {own[:12]}; load the model that the tables were trained on"
        )
    if metadata.base_tables is None:
        return
    own = modules.tables_digest(sets.base_value)
    if metadata.base_tables != own:
        raise FormatError(
            f"{source}: affine numbers for {base} with the tables {metadata.base_tables[:12]}, but "
            f"the base of this model has {own[:12]}; load the model that they were trained on"
        )


def read_tensors(
    stored: StoredTables, sets: TableSets, modules: StoredModules
) -> dict[str, Tensor]:
    """Read all tensors by their names in the model. Before that, check each against its shapes.

    Args:
        stored: The tables-only checkpoint.
        sets: The sets of the model.
        modules: The stored modules of the model.

    Raises:
        FormatError: If tensors are missing or do not fit. It has every problem.
    """
    affine = stored.metadata.is_affine
    tables = modules.affine_shapes() if affine else modules.table_shapes()
    places = {name: place for name, place in sets.places.items() if not place.has_table_dtype}
    expected = {name: tuple(place.parameter.shape) for name, place in places.items()} | tables
    problems = [f"{name} is missing" for name in sorted(tables.keys() - stored.tensors.keys())]
    for name, spec in stored.tensors.items():
        if name not in expected:
            problems.append(f"{shown(name)}: {_why_unexpected(name, modules, affine=affine)}")
        elif spec.shape != expected[name]:
            found, wanted = list(spec.shape), list(expected[name])
            problems.append(f"{name} has the shape {found}, the model expects {wanted}")
        elif spec.dtype not in DTYPES:
            problems.append(f"{name} is {spec.dtype}, expected one of {', '.join(DTYPES)}")
    kinds = {stored.tensors[name].dtype for name in tables.keys() & stored.tensors.keys()}
    if len(kinds) > 1:
        what = "shifts and scales" if affine else "tables"
        problems.append(f"{what} have several dtypes, expected one: {', '.join(sorted(kinds))}")
    tensors = {} if problems else {name: stored.read(name) for name in stored.tensors}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            problems.append(f"{name} has values that are not finite")
    if problems:
        raise FormatError([f"{TABLES_FILE}: {problem}" for problem in problems])
    others = {name: tensor for name, tensor in tensors.items() if name not in tables}
    join = modules.join_affine if affine else modules.join
    return others | join(tensors.__getitem__)


def common_dtype(
    sets: TableSets, modules: StoredModules, tensors: Mapping[str, Tensor]
) -> torch.dtype:
    """Return the dtype that holds every value of the model's tables and of loaded ones.

    Args:
        sets: The sets of the model.
        modules: The stored modules of the model.
        tensors: Loaded tensors by their names in the model.

    Raises:
        OptionError: If the model is sharded with tables in a narrower dtype.
    """
    pair = modules.pairs[0]
    name = next(key for key in (pair.key, *pair.affine_keys) if key in tensors)
    loaded, present = tensors[name].dtype, sets.table_dtype
    common = torch.promote_types(loaded, present)
    if common != present and is_sharded(pair.table.parameter):
        raise OptionError(
            f"the tables are {loaded}, but the model is sharded with tables in {present}, which "
            f"would round them; call set_trainable(model) before the model is sharded"
        )
    return common


def _why_unexpected(name: str, modules: StoredModules, *, affine: bool) -> str:
    if affine and name in modules.table_shapes():
        return "an affine set has shifts and scales in place of tables"
    if not affine and name in modules.affine_shapes():
        return "a set with full tables has no shifts and scales"
    return "the model has no such parameter"
