"""Make layers whose calibration has no rounding in float32, so that any order of sums agrees.

Weights and entries are eighths. Hessians and their factors are small integers with powers of two on
the diagonal. So slopes, quotients and sums stay multiples of 1/64 below 2^13.
"""

from __future__ import annotations

import torch

import spallm_kernels
from spallm_kernels.batched import PreparedHessian


def exact_layer(rows, n, groups, entries, *, device="cpu"):
    """Return weights, tables and codes, then a Hessian with an order of columns and a factor."""
    draw = torch.Generator().manual_seed(n + entries)

    def integers(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=draw)

    weights = integers(-32, 32, rows, n) / 8
    table = (integers(-32, 32, rows, groups, entries) / 8).sort(dim=2)[0]
    codes = torch.from_numpy(spallm_kernels.assign(weights.numpy(), table.numpy()))
    hessian = integers(-1, 1, n, n).triu(1)
    hessian = (hessian + hessian.T + torch.diag(2 ** integers(0, 3, n))).double()
    factor = integers(-1, 1, n, n).triu(1).float()
    order = torch.randperm(n, generator=draw)
    prepared = PreparedHessian(
        *(
            tensor.to(device)
            for tensor in (hessian, hessian.float(), order, hessian.diagonal(), factor)
        )
    )
    return [tensor.to(device) for tensor in (weights, table, codes)], prepared
