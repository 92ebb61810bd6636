"""`lut_linear`, the product with a sketched weight, and `dequantize`, the weight itself."""

from __future__ import annotations

import torch
from torch import Tensor

from . import operators  # noqa: F401 - registers torch.ops.spallm


def lut_linear(
    x: Tensor,
    index_map: Tensor,
    table: Tensor,
    bias: Tensor | None = None,
    *,
    hash_seed: int | None = None,
    backend: str | None = None,
    path: str | None = None,
) -> Tensor:
    """y = x W^T + bias for the sketched weight W (SpaLLM, arXiv 2410.06364, section 3).

    x: float [..., in_features]; index_map: uint8 [out_features, row_bytes], the packed codes;
    table: float [out_features, groups, 2^bits]; bias: [out_features]. With `hash_seed` the codes
    are computed and index_map is [out_features, 0]. Computes in the dtype of x; differentiable in
    x, table and bias, with the table's gradient summed in float32 or wider. `backend` and `path`
    force what `dispatch.py` would choose. Raises TypeError for an x of integers, ValueError for
    shapes that cannot belong together: how many columns packed codes have only the caller knows.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, found {x.dtype}")
    _check(x.shape[-1], index_map, table, hash_seed)
    device = x.device.type
    # torch.compile traces no question of whether a device has autocast at all; meta has none.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return _product(x, index_map, table, bias, hash_seed, backend, path)
    x = x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):  # both passes compute in the dtype of x
        return _product(x, index_map, table, bias, hash_seed, backend, path)


def _product(
    x: Tensor,
    index_map: Tensor,
    table: Tensor,
    bias: Tensor | None,
    hash_seed: int | None,
    backend: str | None,
    path: str | None,
) -> Tensor:
    if bias is not None:
        bias = bias.to(x.dtype)
    y: Tensor = torch.ops.spallm.lut_linear(x, index_map, table, bias, hash_seed, backend, path)
    return y


def dequantize(
    index_map: Tensor,
    table: Tensor,
    in_features: int,
    *,
    hash_seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The dense weight [out_features, in_features] of a sketch, in the dtype of its table.

    index_map: uint8 [out_features, row_bytes], [out_features, 0] with `hash_seed`;
    table: float [out_features, groups, 2^bits]. Not differentiable.
    """
    _check(in_features, index_map, table, hash_seed)
    weight: Tensor = torch.ops.spallm.dequantize(
        index_map, table.detach(), in_features, hash_seed, backend
    )
    return weight


def _check(in_features: int, index_map: Tensor, table: Tensor, hash_seed: int | None) -> None:
    out_features, groups, entries = table.shape
    bits = entries.bit_length() - 1
    if entries != 1 << bits or in_features % groups:
        raise ValueError(
            f"table must be [out_features, groups, 2^bits] with groups that divide the "
            f"{in_features} columns, found {list(table.shape)}"
        )
    least = 0 if hash_seed is not None else -(-in_features * bits // 8)
    if index_map.shape[0] != out_features or index_map.shape[1] < least:
        raise ValueError(
            f"index_map must be [{out_features}, at least {least} bytes], "
            f"found {list(index_map.shape)}"
        )
