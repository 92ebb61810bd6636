"""What calibration tells about a layer's columns, as `cpu.hessian`, on one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PreparedHessian:
    """A damped Hessian and its factor, as `cpu.hessian.PreparedHessian`, on one device.

    full: float64 [n, n]; single: float32 [n, n]; order: int64 [n]; pivots: float64 [n]; factor:
    float32 [n, n].
    """

    full: Tensor
    single: Tensor
    order: Tensor
    pivots: Tensor
    factor: Tensor


def prepare_hessian(hessian: Tensor, damping: float) -> PreparedHessian:
    """Damps H [n, n], orders its columns and factors it, in float64 on its device.

    Raises ValueError for a matrix that is not square or finite, for damping not above 0, and where
    the damped matrix is not positive definite.
    """
    full = hessian.to(torch.float64, copy=True)
    if full.dim() != 2 or full.shape[0] != full.shape[1] or full.numel() == 0:
        raise ValueError(f"a Hessian must be [n, n], found {list(full.shape)}")
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping must be finite and above 0, found {damping}")
    if not bool(torch.isfinite(full).all()):
        raise ValueError("a Hessian must be finite")
    mean = full.diagonal().mean().item()
    full.diagonal().add_(damping * mean if mean else 1.0)
    order = full.diagonal().argsort(descending=True, stable=True)
    lower, failed = torch.linalg.cholesky_ex(full[order][:, order].flip(0, 1))
    if int(failed):
        raise ValueError(f"the Hessian is not positive definite with damping {damping}: use more")
    upper = lower.flip(0, 1)
    pivots = torch.empty_like(full[0])
    pivots[order] = upper.diagonal()
    factor = (upper / upper.diagonal()).triu(1).float().contiguous()
    return PreparedHessian(full, full.float(), order, pivots, factor)


def importance(hessian: PreparedHessian, power: float | None) -> Tensor:
    """Weights of the columns for clustering, float32 [1, n], the greatest 1."""
    values = hessian.full.diagonal() if power is None else hessian.pivots
    relative = (values / values.max()) ** (1.0 if power is None else power)
    return relative.float()[None]
