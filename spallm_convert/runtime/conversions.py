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

from spallm_formats import TABLE_ENDING

_NAME_END = re.compile(r"[a-zA-Z0-9]\$?$")  # to transformers, the end of a whole name


def with_tables(conversions: Sequence[Any]) -> list[Any]:
    """Return conversions of weights, each followed by the same conversion of the tables.

    Args:
        conversions: Conversions of transformers that match whole names.
    """
    return [each for change in conversions for each in (change, *_of_tables(change))]


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
