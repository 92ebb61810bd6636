"""Load the backends of `lut_linear_sets`, and describe what they have in common."""

from __future__ import annotations

import functools
import importlib
from typing import Protocol, cast

from torch import Tensor

_MODULES = {
    "cpu": "spallm_kernels.cpu.tenants",
    "portable": "spallm_kernels.triton.portable_tenants",
    "reference": "spallm_kernels.reference.tenants",
    "triton": "spallm_kernels.triton.tenants",
}


class SetDecoder(Protocol):
    """Describe a module that multiplies tokens with their own tables, all sets in one call."""

    def can_decode(self, x: Tensor, table: Tensor, *, hashed: bool) -> bool: ...

    def counts_first(self, x: Tensor) -> bool: ...

    def most_tokens(self, x: Tensor, table: Tensor, *, hashed: bool) -> float: ...

    def decode(
        self,
        x: Tensor,
        sets: Tensor,
        index_map: Tensor,
        table: Tensor,
        tables: Tensor,
        bias: Tensor | None = None,
        *,
        hash_seed: int | None = None,
    ) -> Tensor: ...


@functools.cache
def load_set_decoder(name: str) -> SetDecoder:
    """Return the module of a backend for sets of tables, which is imported on the first call.

    Args:
        name: `cpu`, `portable`, `reference` or `triton`.

    Returns:
        The module.
    """
    return cast(SetDecoder, importlib.import_module(_MODULES[name]))
