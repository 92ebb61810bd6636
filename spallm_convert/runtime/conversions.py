"""Let transformers load and save tables in the same way as the index maps that they belong to.

transformers renames, stacks, concatenates and splits tensors that match patterns. Until version
5.20 a pattern for "experts.*.up_proj.weight" also matches "experts.0.up_proj.weight_table" and
leaves the end of the name as it is. Later versions match whole names, and ask the quantizer for
more conversions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from spallm_formats import TABLE_ENDING

_NAME_END = re.compile(r"[a-zA-Z0-9]\$?$")  # to transformers, the end of a whole name


def with_tables(conversions: Sequence[Any]) -> list[Any]:
    """Return conversions of weights, each followed by the same conversion of the tables.

    Args:
        conversions: Conversions of transformers that match whole names.
    """
    return [each for change in conversions for each in (change, *_of_tables(change))]


def wanted_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtypes that a model's parameters should be loaded in, by name.

    Until version 5.20, transformers loads what it renames in the dtype of the checkpoint.

    Args:
        model: The model before its weights are loaded.
        dtype: Dtype of the model.
    """
    from transformers.core_model_loading import build_glob_alternation

    wanted = {name: parameter.dtype for name, parameter in model.named_parameters()}
    made = getattr(model, "_get_dtype_plan", None)  # in early versions, an attribute holds the plan
    plan = getattr(model, "dtype_plan", None) if made is None else made(dtype)
    if plan:  # transformers keeps some modules in float32
        pattern, originals, *_ = build_glob_alternation(list(plan))
        for name, usual in wanted.items():
            found = pattern.search(name)
            if found is not None and usual.is_floating_point:
                wanted[name] = plan[originals[found.lastgroup or ""]]
    return wanted


def keep_sizes_of_one(conversions: Sequence[Any] | None) -> None:
    """Let transformers save tables of experts with one group, or weights with one row, as they are.

    Until version 5.21, it drops all dimensions of size 1 when it takes stacked experts apart.

    Args:
        conversions: The conversions that a model was loaded with, which are changed. None: none.
    """
    from transformers.core_model_loading import MergeModulelist

    from .stacking import Stack

    for change in conversions or ():
        if hasattr(change, "operations"):
            change.operations = [
                Stack(operation.dim) if type(operation) is MergeModulelist else operation
                for operation in change.operations
            ]


def _of_tables(change: Any) -> list[Any]:
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    sources, targets = change._original_source_patterns, change._original_target_patterns
    # Other classes, and patterns with another end, change the start or the middle of names only.
    if type(change) not in (WeightConverter, WeightRenaming) or not all(
        _NAME_END.search(pattern) for pattern in (*sources, *targets)
    ):
        return []
    options = {"operations": [*change.operations]} if hasattr(change, "operations") else {}
    return [change.copy([*map(_table, sources)], [*map(_table, targets)], **options)]


def _table(pattern: str) -> str:
    """Return the pattern of the tables that belong to index maps with this pattern."""
    end = "$" if pattern.endswith("$") else ""
    return pattern.removesuffix("$") + TABLE_ENDING + end
