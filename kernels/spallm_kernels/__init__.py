"""Numeric code of sketching: clustering, hashing, and the sketched linear layer.

`reference` states each operation plainly, `cpu` is fast in numba, `triton` on NVIDIA GPUs. The
names at the top are the fast ones, or choose a backend by device. Importing this package imports
neither numba, torch nor Triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cpu.assign import assign, squared_error
    from .cpu.hashing import hash_codes, hash_table
    from .cpu.kmeans import kmeans
    from .dispatch import choose_backend
    from .linear import dequantize, lut_linear

__all__ = [
    "assign",
    "choose_backend",
    "dequantize",
    "hash_codes",
    "hash_table",
    "kmeans",
    "lut_linear",
    "squared_error",
]

_HOMES = {
    "assign": "cpu.assign",
    "choose_backend": "dispatch",
    "dequantize": "linear",
    "hash_codes": "cpu.hashing",
    "hash_table": "cpu.hashing",
    "kmeans": "cpu.kmeans",
    "lut_linear": "linear",
    "squared_error": "cpu.assign",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
