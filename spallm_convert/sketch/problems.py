"""Say what keeps layers from being sketched: their names, dtypes, shapes or groups."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from spallm_convert.errors import OptionError
from spallm_convert.source.stored_names import LoadedNames
from spallm_formats import (
    CONFIG_FILE,
    FLOAT_STORAGE,
    TABLE_SUFFIX,
    SketchedModule,
    StoredTensor,
    shown,
    summary,
)

from .layer import Layer

_EXPERT = re.compile(r"(.*\.experts\.)(\d{1,6})(\..*)")


def name_problems(tensors: Mapping[str, StoredTensor], layers: Mapping[str, Layer]) -> list[str]:
    """Return the tensors whose names the format reserves for sketch tables."""
    tables = {layer.module.table_name(name) for name, layer in layers.items()}
    reserved = [shown(name) for name in tensors if name.endswith(TABLE_SUFFIX) or name in tables]
    if not reserved:
        return []
    return [
        f"found {summary(reserved, ', ')}, but only sketch tables may have names that end in "
        f"{TABLE_SUFFIX!r}: convert a dense model, or rename these tensors"
    ]


def double_weights(parameter: str, names: LoadedNames) -> list[str]:
    """Return a problem if a parameter is stored under several names."""
    found = names.doubled.get(parameter, [])
    if not found:
        return []
    return [f"tensors {' and '.join(map(shown, found))} are the same weight: remove one of them"]


def tensor_problems(weight: StoredTensor, shape: tuple[int, ...]) -> list[str]:
    """Return what keeps a weight from being sketched: its dtype, or its shape."""
    where = f"{weight.file.name}: tensor {shown(weight.name)}"
    if weight.dtype not in FLOAT_STORAGE:
        accepted = ", ".join(FLOAT_STORAGE)
        return [
            f"{where} has the dtype {weight.dtype}, only {accepted} can be sketched (--ignore "
            f"{weight.name.removesuffix('.weight')} leaves the layer dense)"
        ]
    if weight.shape != shape:
        return [
            f"{where} is {list(weight.shape)}, the model expects {list(shape)}: use the "
            f"{CONFIG_FILE} that belongs to these weights"
        ]
    return []


def missing_experts(tensors: Iterable[str], counts: Collection[int]) -> list[str]:
    """Return a problem if experts of a block are not stored although others are.

    Args:
        tensors: Names of the tensors of the checkpoint.
        counts: The numbers of experts that blocks of the model have.
    """
    stored: dict[str, dict[str, set[int]]] = {}  # by block and kind of weight
    for match in filter(None, map(_EXPERT.fullmatch, tensors)):
        stored.setdefault(match[1], {}).setdefault(match[3], set()).add(int(match[2]))
    missing = []
    for block, kinds in stored.items():
        for kind, numbers in kinds.items():  # LongCat has more experts of some kinds than of others
            fitting = [count for count in counts if count > max(numbers)]
            lost = sorted(set(range(min(fitting, default=0))) - numbers)
            missing += [f"{block}{number}{kind}" for number in lost]
    if not missing:
        return []
    return [
        f"experts without a tensor: {summary(missing, ', ')}; use the {CONFIG_FILE} that belongs "
        f"to these weights, or get the weights again"
    ]


def check_groups(modules: dict[str, SketchedModule]) -> None:
    """Raise OptionError if the groups do not divide the columns of every module."""
    misfits = {n: m for n, m in modules.items() if m.in_features % m.groups_per_row}
    if not misfits:
        return
    groups = next(iter(misfits.values())).groups_per_row  # of a recipe, one number after another
    named = [
        f"{name} ({module.in_features} columns)"
        for name, module in misfits.items()
        if module.groups_per_row == groups
    ]
    raise OptionError(
        f"groups_per_row {groups} does not divide the columns of {_enumerated(named)}; use a "
        f"divisor, or --groups-per-row auto"
    )


def _enumerated(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def why_none(left_dense: dict[str, str]) -> str:
    """Return why there is no layer to sketch, in parentheses, with up to three reasons."""
    if not left_dense:
        return "(the model has none inside its blocks)"
    return "(" + "; ".join(f"{name}: {why}" for name, why in list(left_dense.items())[:3]) + ")"
