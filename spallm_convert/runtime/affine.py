"""Give a sketched model affine numbers: a shift and a scale for each table.

A layer then computes with shift + scale * table. The tables themselves stay those of the base, so a
set takes 2 / 2^bits of the memory that full tables take. A model has these parameters only after
`set_trainable` has asked for them or an affine set was loaded. At first they change nothing: shifts
are 0 and scales are 1.

The numbers are parameters beside the tables, so sharding, optimizers and `TableSets` treat them
like any other parameter. The gradient of the tables exists already, and autograd derives theirs
from it, for layers, experts and embeddings alike.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from spallm_convert.errors import OptionError
from spallm_formats import SCALE_ENDING, SHIFT_ENDING, TABLE_ENDING

from .parameters import Pair, all_pairs
from .sharding import is_sharded, whole
from .sketch import affine_paths, apply_affine
from .table_sets import BASE, TableSets

#: The attribute of a module whose tables are not those of the base any more.
_REPLACED = "_sketch_tables_replaced"


def check_affine_possible(sets: TableSets) -> None:
    """Raise OptionError if affine numbers cannot be added to a model that has none.

    Args:
        sets: The sets of the model.
    """
    for pair in sets.pairs:
        table = pair.table.parameter
        if pair.affine:
            continue
        if is_sharded(table):
            raise OptionError(
                "the model is sharded and has no affine numbers, expected them to be added first: "
                "call set_trainable(model, affine=True) before the model is sharded"
            )
        if table.is_meta:
            raise OptionError(
                f"{pair.key} is offloaded (device_map), but affine numbers are added only if the "
                f"whole model is in memory: load it without device_map"
            )
        for name in affine_paths(pair.index_map.name):
            if hasattr(pair.index_map.module, name):
                raise OptionError(
                    f"{type(pair.index_map.module).__name__} has a {name!r} of its own, so the "
                    f"tables {pair.key} cannot be affine"
                )


def add_affine(model: nn.Module) -> TableSets:
    """Add shifts of 0 and scales of 1 to all sketches that have none, frozen.

    Args:
        model: A model from `sketched_model` that `check_affine_possible` accepted.

    Returns:
        The sets of the model, which know the new parameters.
    """
    made: dict[int, tuple[nn.Parameter, ...]] = {}  # tied modules get the same
    for pair in all_pairs(model):
        table = pair.table.parameter
        if pair.affine:
            continue
        if id(table) not in made:
            shift = torch.zeros(table.shape[:-1], dtype=table.dtype, device=table.device)
            numbers = (shift, torch.ones_like(shift))
            made[id(table)] = tuple(nn.Parameter(n, requires_grad=False) for n in numbers)
        owner, index_map = pair.index_map.module, pair.index_map.name
        for name, parameter in zip(affine_paths(index_map), made[id(table)], strict=True):
            owner.register_parameter(name, parameter)
        hook: Any = owner.register_load_state_dict_pre_hook
        hook(functools.partial(_complete, index_map))
    sets = TableSets.of(model)
    sets.complete()
    return sets


def is_saved_affine(sets: TableSets) -> bool:
    """Return whether the active set is saved as affine numbers, not as full tables.

    That is so if it has no tables of its own, and `load_state_dict` has not replaced the base's.
    The base counts as affine if its numbers are trained, or were, and its tables are not.

    Args:
        sets: The sets of the model. If it is sharded, every process must ask.
    """
    numbers = [place for pair in sets.pairs for place in pair.affine.values()]
    replaced = any(getattr(pair.table.module, _REPLACED, False) for pair in sets.pairs)
    if replaced or not numbers:
        return False
    if sets.active != BASE:
        return sets.is_affine(sets.active)
    if any(pair.table.parameter.requires_grad for pair in sets.pairs):
        return False
    if any(place.parameter.requires_grad for place in numbers):
        return True
    return not all(torch.equal(whole(p.parameter), whole(p.identity())) for p in numbers)


def with_affine(pairs: list[Pair], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tables that a model computes with, by key of their pair.

    Args:
        pairs: The sketches of the model.
        tensors: Tables, shifts and scales by name in the model. Shifts and scales may be missing.
    """
    found = {}
    for pair in pairs:
        table = tensors[pair.key]
        shift, scale = map(tensors.get, pair.affine_keys)
        both = shift is not None and scale is not None
        found[pair.key] = apply_affine(table, shift, scale) if both else table  # type: ignore[arg-type]
    return found


def without_affine(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with full tables in place of tables, shifts and scales.

    Args:
        state_dict: The state dict of a sketched model.
    """
    found = dict(state_dict)
    for name, table in state_dict.items():
        stem = name.removesuffix(TABLE_ENDING)
        shift, scale = stem + SHIFT_ENDING, stem + SCALE_ENDING
        if stem != name and shift in state_dict and scale in state_dict:
            numbers = found.pop(shift), found.pop(scale)
            found[name] = apply_affine(table, *numbers)
    return found


def _complete(
    index_map: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any
) -> None:
    """Reset shifts and scales when full tables are loaded by `load_state_dict`.

    Trainer's checkpoints hold full tables. The numbers of the model would be applied once more. New
    numbers would fit these tables only, so they are not saved without them.
    """
    if f"{prefix}{index_map}{TABLE_ENDING}" not in state_dict:
        return
    names = affine_paths(index_map)
    if not all(prefix + name in state_dict for name in names):
        setattr(module, _REPLACED, True)
    for name, fill in zip(names, (0.0, 1.0), strict=True):
        state_dict.setdefault(prefix + name, torch.full_like(getattr(module, name), fill))
