"""Say what keeps layers from being sketched: their names, dtypes, shapes or groups."""

from __future__ import annotations

from collections.abc import Container, Mapping

from spallm_convert.errors import OptionError
from spallm_convert.source.skeleton import Skeleton, aliases
from spallm_formats import (
    CONFIG_FILE,
    FLOAT_STORAGE,
    INDEX_MAP_SUFFIX,
    TABLE_SUFFIX,
    SketchedModule,
    StoredTensor,
    shown,
    summary,
)


def name_problems(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return the tensors whose names the format reserves for sketch tables."""
    reserved = [shown(name) for name in tensors if name.endswith(TABLE_SUFFIX)]
    if not reserved:
        return []
    return [
        f"found {summary(reserved, ', ')}, but only sketch tables may have names that end in "
        f"{TABLE_SUFFIX!r}: convert a dense model, or rename these tensors"
    ]


def double_weights(path: str, skeleton: Skeleton, tensors: Container[str]) -> list[str]:
    """Return a problem if the weight of a layer is stored under several names."""
    names = dict.fromkeys(aliases(path, skeleton.base_prefix))
    found = [
        name + INDEX_MAP_SUFFIX
        for name in names
        if name + INDEX_MAP_SUFFIX in tensors and (name == path or name not in skeleton.linears)
    ]
    if len(found) < 2:
        return []
    return [f"tensors {' and '.join(map(shown, found))} are the same weight: remove one of them"]


def tensor_problems(weight: StoredTensor, shape: tuple[int, int]) -> list[str]:
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


def check_groups(modules: dict[str, SketchedModule]) -> None:
    """Raise OptionError if the groups do not divide the columns of every module."""
    misfits = [
        f"{name} ({module.in_features} columns)"
        for name, module in modules.items()
        if module.in_features % module.groups_per_row
    ]
    if misfits:
        groups = next(iter(modules.values())).groups_per_row
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        named = ", ".join(misfits[:3]) + more
        raise OptionError(
            f"groups_per_row {groups} does not divide the columns of {named}; use a divisor, or "
            f"--groups-per-row auto"
        )


def why_none(left_dense: dict[str, str]) -> str:
    """Return why there is no layer to sketch, in parentheses, with up to three reasons."""
    if not left_dense:
        return "(the model has none inside its blocks)"
    return "(" + "; ".join(f"{name}: {why}" for name, why in list(left_dense.items())[:3]) + ")"
