"""Provide the numeric code of sketching: clustering, calibration, hashing and the sketched layer.

`reference` states each operation plainly. `cpu` is the fast version in numba, `batched` computes
many rows at once in torch, and `triton` runs on GPUs. The names exported here are the fast CPU
versions, or functions that choose a backend by device. Importing this package imports neither
numba, torch nor Triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .affine import lut_linear_affine
    from .cpu.assign import assign, squared_error
    from .cpu.calibrated import Fitted, fit
    from .cpu.compensate import compensate
    from .cpu.descend import descend
    from .cpu.hashing import hash_codes, hash_table
    from .cpu.hessian import PreparedHessian, importance, prepare_hessian
    from .cpu.kmeans import kmeans
    from .cpu.least_squares import least_squares
    from .cpu.quadratic import look_up, quadratic_loss
    from .dispatch import choose_backend
    from .embedding import lut_embedding
    from .experts import lut_experts
    from .linear import dequantize, lut_linear
    from .tenants import lut_linear_sets

__all__ = [
    "Fitted",
    "PreparedHessian",
    "assign",
    "choose_backend",
    "compensate",
    "dequantize",
    "descend",
    "fit",
    "hash_codes",
    "hash_table",
    "importance",
    "kmeans",
    "least_squares",
    "look_up",
    "lut_embedding",
    "lut_experts",
    "lut_linear",
    "lut_linear_affine",
    "lut_linear_sets",
    "prepare_hessian",
    "quadratic_loss",
    "squared_error",
]

_HOMES = {
    "Fitted": "cpu.calibrated",
    "PreparedHessian": "cpu.hessian",
    "assign": "cpu.assign",
    "choose_backend": "dispatch",
    "compensate": "cpu.compensate",
    "dequantize": "linear",
    "descend": "cpu.descend",
    "fit": "cpu.calibrated",
    "hash_codes": "cpu.hashing",
    "hash_table": "cpu.hashing",
    "importance": "cpu.hessian",
    "kmeans": "cpu.kmeans",
    "least_squares": "cpu.least_squares",
    "look_up": "cpu.quadratic",
    "lut_embedding": "embedding",
    "lut_experts": "experts",
    "lut_linear": "linear",
    "lut_linear_affine": "affine",
    "lut_linear_sets": "tenants",
    "prepare_hessian": "cpu.hessian",
    "quadratic_loss": "cpu.quadratic",
    "squared_error": "cpu.assign",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
