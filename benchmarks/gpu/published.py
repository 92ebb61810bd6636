"""Restate the published runtime of sketched layers in our own words, to measure it against ours.

SketchTune (github.com/LeanModels/SketchTune) gathers the dense weight from 4-bit codes, two in a
byte, and multiplies. Its backward pass gathers again, computes the whole gradient of the weight,
and adds it up by code. There, gather and addition are CUDA kernels. Here they exist twice: in plain
torch, which is slower than such kernels, and with our own kernels for the same two steps, which
should not be slower. So the published runtime lies between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spallm_kernels.dispatch import choose_backend, load_backend


class Steps(NamedTuple):
    """Hold the two steps: codes and table to the weight, and its gradient to the table's."""

    gather: Callable[[Tensor, Tensor, int], Tensor]
    scatter_add: Callable[[Tensor, Tensor, Tensor], Tensor]


class _Published(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, table: Tensor, steps: Steps) -> Tensor:
        ctx.save_for_backward(x, codes, table)
        ctx.steps = steps
        return x @ steps.gather(codes, table, x.shape[1]).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (y_grad,) = gradients
        x, codes, table = ctx.saved_tensors
        x_grad = y_grad @ ctx.steps.gather(codes, table, x.shape[1])
        table_grad = ctx.steps.scatter_add(y_grad.T @ x, codes, table)
        return x_grad, None, table_grad.to(table.dtype), None


def published_linear(x: Tensor, codes: Tensor, table: Tensor, steps: Steps) -> Tensor:
    """Compute the product as SketchTune does.

    x: [tokens, in_features]. codes: uint8 [out_features, in_features / 2], the lower half of a byte
    first, as in our format. table: [out_features, groups, 16].
    """
    y: Tensor = _Published.apply(x, codes, table, steps)
    return y


def _gather(codes: Tensor, table: Tensor, in_features: int) -> Tensor:
    groups = _unpacked(codes, table, in_features)
    return table.gather(2, groups).view(table.shape[0], in_features)


def _scatter_add(weight_grad: Tensor, codes: Tensor, table: Tensor) -> Tensor:
    groups = _unpacked(codes, table, weight_grad.shape[1])
    sums = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
    return sums.scatter_add_(2, groups, weight_grad.float().view(groups.shape))


def _unpacked(codes: Tensor, table: Tensor, in_features: int) -> Tensor:
    """Return int64 codes [out_features, groups, columns of a group]; torch indexes with int64."""
    used = codes[:, : in_features // 2]
    both = torch.stack((used & 15, used >> 4), dim=-1)
    return both.view(table.shape[0], table.shape[1], -1).long()


def _our_gather(codes: Tensor, table: Tensor, in_features: int) -> Tensor:
    return load_backend(choose_backend(table.device)).dequantize(codes, table, in_features)


def _our_scatter_add(weight_grad: Tensor, codes: Tensor, table: Tensor) -> Tensor:
    return load_backend(choose_backend(table.device)).table_grad(weight_grad, codes, table)


#: Both restatements, by name.
STEPS = {
    "published, in torch": Steps(_gather, _scatter_add),
    "published, with our kernels": Steps(_our_gather, _our_scatter_add),
}
