"""Import every file of mutations, so that all kinds are known."""

from __future__ import annotations

from . import (  # noqa: F401
    faults,
    mutations_checkpoint,
    mutations_files,
    mutations_gguf,
    mutations_source,
    mutations_tables,
    mutations_work,
)
from .cases import KINDS, Case, all_kinds, cases

KINDS[faults.FAMILY] = faults.MUTATIONS

__all__ = ["KINDS", "Case", "all_kinds", "cases"]
