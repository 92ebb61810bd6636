"""Prepare a layer's Hessian for choosing codes, as `cpu.hessian` does, on one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PreparedHessian:
    """Hold a damped Hessian and its Cholesky factor on one device.

    `cpu.hessian` has the definitions.

    Attributes:
        full: The damped Hessian, float64 [n, n].
        single: The same in float32.
        order: The columns in the order of choice, int64 [n].
        pivots: R_ii of each column, float64 [n], in the layer's order of columns.
        factor: F in the order of choice, float32 [n, n], zero on and below the diagonal.
    """

    full: Tensor
    single: Tensor
    order: Tensor
    pivots: Tensor
    factor: Tensor


def prepare_hessian(hessian: Tensor, damping: float) -> PreparedHessian:
    """Damp a Hessian, order its columns and factor it, in float64 on its device.

    Args:
        hessian: X^T X of the layer's inputs, float [n, n], symmetric and positive semidefinite.
        damping: This fraction of the diagonal's mean is added to the diagonal; above 0.

    Returns:
        The damped Hessian and its factor.

    Raises:
        ValueError: If the matrix is not square or finite, if the damping is not above 0, or if the
            damped matrix is not positive definite.
    """
    full = hessian.to(torch.float64, copy=True)
    if full.dim() != 2 or full.shape[0] != full.shape[1] or full.numel() == 0:
        raise ValueError(f"a Hessian must be [n, n], found {list(full.shape)}")
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping must be finite and above 0, found {damping}")
    if not bool(torch.isfinite(full).all()):
        raise ValueError("a Hessian must be finite, found NaN or infinite values")
    mean = full.diagonal().mean().item()
    full.diagonal().add_(damping * mean if mean else 1.0)
    order = full.diagonal().argsort(descending=True, stable=True)
    lower, failed = torch.linalg.cholesky_ex(full[order][:, order].flip(0, 1))
    if int(failed):
        raise ValueError(
            f"the Hessian is not positive definite with damping {damping}: use a larger damping"
        )
    upper = lower.flip(0, 1)
    pivots = torch.empty_like(full[0])
    pivots[order] = upper.diagonal()
    factor = (upper / upper.diagonal()).triu(1).float().contiguous()
    return PreparedHessian(full, full.float(), order, pivots, factor)


def importance(hessian: PreparedHessian, power: float | None) -> Tensor:
    """Return the importance of the columns for clustering.

    Args:
        hessian: Damped and factored Hessian of n columns.
        power: Power of the pivots R_ii, which gives LeanQuant's diag(chol(H^-1))^-power (arXiv
            2407.10032). None: the diagonal of H.

    Returns:
        float32 [1, n], scaled so that the largest value is 1.
    """
    values = hessian.full.diagonal() if power is None else hessian.pivots
    relative = (values / values.max()) ** (1.0 if power is None else power)
    return relative.float()[None]
