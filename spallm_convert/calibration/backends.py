"""Compute calibrated sketches with numba on the CPU and with torch on any other device.

Both have the same functions. `spallm_kernels.cpu` takes NumPy arrays and works on a few rows at a
time, so that they stay in the cache. `spallm_kernels.batched` takes tensors and works on all rows
at once. Callers pass tensors in both cases: on the CPU, tensors share their memory with the arrays.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from spallm_kernels import (
    batched,
    descend,
    fit,
    least_squares,
    look_up,
    prepare_hessian,
    quadratic_loss,
)


class Numerics(Protocol):
    """Functions of tensors on one device, documented in `spallm_kernels.cpu`.

    Pass a prepared Hessian only to the implementation that made it. Its `full` is the damped
    matrix, float64 [n, n].
    """

    def prepare_hessian(self, hessian: Tensor, damping: float) -> Any: ...

    def fit(
        self, weights: Tensor, hessian: Any, groups: int, entries: int, **how: Any
    ) -> batched.Fitted: ...

    def descend(
        self, weights: Tensor, table: Tensor, codes: Tensor, hessian: Any, sweeps: int
    ) -> Tensor: ...

    def least_squares(
        self, weights: Tensor, table: Tensor, codes: Tensor, hessian: Any
    ) -> tuple[Tensor, Tensor]: ...

    def look_up(self, table: Tensor, codes: Tensor) -> Tensor: ...

    def quadratic_loss(self, weights: Tensor, dense: Tensor, hessian: Tensor) -> Tensor: ...


def choose_numerics(device: torch.device) -> Numerics:
    """Return the fastest implementation for tensors on a device."""
    return OnCpu() if device.type == "cpu" else cast(Numerics, batched)


class OnCpu:
    """The functions of `spallm_kernels.cpu`, with tensors in place of arrays."""

    def prepare_hessian(self, hessian: Tensor, damping: float) -> Any:
        return prepare_hessian(hessian.numpy(), damping)

    def fit(
        self, weights: Tensor, hessian: Any, groups: int, entries: int, **how: Any
    ) -> batched.Fitted:
        table, codes, losses = fit(weights.numpy(), hessian, groups, entries, **how)
        return batched.Fitted(torch.from_numpy(table), torch.from_numpy(codes), losses)

    def descend(
        self, weights: Tensor, table: Tensor, codes: Tensor, hessian: Any, sweeps: int
    ) -> Tensor:
        arrays = weights.numpy(), table.numpy(), codes.numpy()
        return torch.from_numpy(descend(*arrays, hessian, sweeps))

    def least_squares(
        self, weights: Tensor, table: Tensor, codes: Tensor, hessian: Any
    ) -> tuple[Tensor, Tensor]:
        arrays = weights.numpy(), table.numpy(), codes.numpy()
        new, renamed = least_squares(*arrays, hessian)
        return torch.from_numpy(new), torch.from_numpy(renamed)

    def look_up(self, table: Tensor, codes: Tensor) -> Tensor:
        return torch.from_numpy(look_up(table.numpy(), codes.numpy()))

    def quadratic_loss(self, weights: Tensor, dense: Tensor, hessian: Tensor) -> Tensor:
        arrays = weights.numpy(), dense.numpy(), hessian.numpy()
        return torch.from_numpy(quadratic_loss(*arrays))
