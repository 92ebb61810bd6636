"""Compute the product with a sketched weight (`lut_linear`), or the weight (`dequantize`)."""

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
    """Compute y = x W^T + bias for a sketched weight W (SpaLLM, arXiv 2410.06364, section 3).

    The result is differentiable once in x, table and bias. The gradient of the table is summed in
    float32 or wider. Under autocast, x is first cast to autocast's dtype, unless it is float64.

    Args:
        x: Inputs, float [..., in_features].
        index_map: Packed codes, uint8 [out_features, row_bytes]; [out_features, 0] with
            `hash_seed`.
        table: Tables, float [out_features, groups, 2^bits].
        bias: Float [out_features], or None.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        backend: `cpu`, `portable`, `reference` or `triton`; by default the fastest one (see
            `dispatch.py`).
        path: `decode` or `dense`; by default the faster one (see `dispatch.py`).

    Returns:
        y [..., out_features], computed in the dtype of x.

    Raises:
        TypeError: If x is not floating point.
        ValueError: If the shapes cannot match, or the backend or path cannot be used. An index map
            may be longer than it needs to be: only the caller knows how many columns the packed
            codes have.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, found {x.dtype}")
    check_shapes(x.shape[-1], index_map, table, hash_seed)
    device = x.device.type
    # Meta has no autocast. It is tested by name: torch.compile cannot trace the question itself.
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
    # `.default` names the only overload. Without it, torch would look for one in each call.
    product = torch.ops.spallm.lut_linear.default
    y: Tensor = product(x, index_map, table, bias, hash_seed, backend, path)
    return y


def dequantize(
    index_map: Tensor,
    table: Tensor,
    in_features: int,
    *,
    hash_seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the dense weight of a sketch. It is not differentiable.

    Args:
        index_map: Packed codes, uint8 [out_features, row_bytes]; [out_features, 0] with
            `hash_seed`.
        table: Tables, float [out_features, groups, 2^bits].
        in_features: Columns of the weight.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        backend: `cpu`, `portable`, `reference` or `triton`; by default the fastest one (see
            `dispatch.py`).

    Returns:
        The weight [out_features, in_features], in the dtype of the table.

    Raises:
        ValueError: If the shapes cannot match or the backend cannot be used.
    """
    check_shapes(in_features, index_map, table, hash_seed)
    weight: Tensor = torch.ops.spallm.dequantize(
        index_map, table.detach(), in_features, hash_seed, backend
    )
    return weight


def check_shapes(in_features: int, index_map: Tensor, table: Tensor, hash_seed: int | None) -> None:
    """Check that an index map and tables can belong together.

    Args:
        in_features: Columns of the weight.
        index_map: Packed codes, uint8 [out_features, row_bytes]; [out_features, 0] with
            `hash_seed`.
        table: Tables, float [out_features, groups, 2^bits].
        hash_seed: Seed of the `hash` mapping; None if codes are stored.

    Raises:
        ValueError: If the shapes cannot match.
    """
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
