"""Multiply tokens with one sketched weight, each with its own affine numbers (`lut_linear_affine`).

An affine set has a shift a and a scale b for each table T of the base, and stands for the tables
a + b T. Its product is therefore an epilogue on the base's, one for each group g of columns:

    y[t, r] = sum_g ( a[r, g] * sum of x[t, i] over i in g  +  b[r, g] * P[t, r, g] )

P is the product of the base for the columns of g. With one group it is the ordinary product, so
tokens of many sets cost about as much as tokens of the base. It is inference only.

Everything here is torch, without a synchronization with the host. torch.compile and CUDA graphs
take it as it is, and the product inside is an operator already, so there is no operator for the
whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .linear import check_shapes, lut_linear
from .operators import bits_of, wide

_INTEGERS = (torch.int64, torch.int32)


def lut_linear_affine(
    x: Tensor,
    index_map: Tensor,
    table: Tensor,
    shift: Tensor,
    scale: Tensor,
    sets: Tensor,
    bias: Tensor | None = None,
    *,
    hash_seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute y[t] = x[t] W[sets[t]]^T + bias, where W[s] has the tables shift[s] + scale[s] table.

    The result has no derivatives. Under autocast, x is first cast to autocast's dtype, unless it is
    float64. Shifts and scales are applied in float32 or wider, to products in the dtype of x.

    With several groups per row, each group is a product of its own columns, which takes about as
    long as one product in all. If the codes of a group do not begin at a whole byte, or are
    computed (`hash_seed`), each group takes as long as the whole product.

    Args:
        x: Inputs, float [..., in_features].
        index_map: Packed codes, uint8 [out_features, row_bytes]; [out_features, 0] with
            `hash_seed`.
        table: Tables of the base, float [out_features, groups, 2^bits].
        shift: Shifts, float [slots, out_features, groups].
        scale: Scales, float [slots, out_features, groups].
        sets: Number of the slot of each token, int64 or int32 [...] on the device of x; -1 for the
            base alone. Slots that no token names may hold anything. On a GPU values are not
            checked.
        bias: Float [out_features], or None.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        backend: `cpu`, `portable`, `reference` or `triton`; by default the fastest one (see
            `dispatch.py`).

    Returns:
        y [..., out_features], computed in the dtype of x.

    Raises:
        IndexError: On the CPU, if a slot does not exist.
        TypeError: If x is not floating point, or sets are not integers of 32 or 64 bits.
        ValueError: If the shapes cannot match, or the backend cannot be used.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, found {x.dtype}")
    if sets.dtype not in _INTEGERS:
        raise TypeError(f"sets must be int64 or int32, found {sets.dtype}")
    check_shapes(x.shape[-1], index_map, table, hash_seed)
    for name, numbers in (("shift", shift), ("scale", scale)):
        if numbers.shape != (len(shift), *table.shape[:2]):
            raise ValueError(
                f"{name} must be [slots, {table.shape[0]}, {table.shape[1]}], with as many slots "
                f"as the other has, found {list(numbers.shape)}"
            )
    if sets.shape != x.shape[:-1]:
        raise ValueError(f"sets must be {list(x.shape[:-1])}, found {list(sets.shape)}")
    device = x.device.type
    # As in `lut_linear`.
    autocasts = device != "meta" and torch.is_autocast_enabled(device)
    if autocasts and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    with torch.no_grad(), torch.autocast(device, enabled=False):
        tokens = x.reshape(-1, x.shape[-1])
        products = _group_products(tokens, index_map, table, hash_seed, backend)
        y = _epilogue(tokens, products, shift, scale, sets.reshape(-1))
        if bias is not None:
            y = y + bias.to(y.dtype)
        return y.to(x.dtype).reshape(*x.shape[:-1], table.shape[0])


def _epilogue(
    x: Tensor, products: Iterator[Tensor], shift: Tensor, scale: Tensor, sets: Tensor
) -> Tensor:
    """Return the results [tokens, out_features], in float32 or wider.

    Args:
        x: Inputs, float [tokens, in_features].
        products: Products of the base with each group of columns, float [tokens, out_features].
        shift: As for `lut_linear_affine`.
        scale: As for `lut_linear_affine`.
        sets: Slots, [tokens].
    """
    tokens, (slots, rows, groups), dtype = len(x), shift.shape, wide(x.dtype)
    base = x.new_zeros(tokens, rows, dtype=dtype)
    y, slot = torch.zeros_like(base), sets.clamp(min=0)
    sums = x.view(tokens, groups, x.shape[1] // groups).sum(2, dtype=dtype)
    for group, product in enumerate(products):
        base.add_(product)
        if slots:
            # One group at a time: numbers of all groups together would be read with a stride in
            # each group (8 groups on the CPU: 23 -> 12 ms).
            shifted, scaled = (n[:, :, group].index_select(0, slot) for n in (shift, scale))
            y.addcmul_(shifted.to(dtype), sums[:, group, None])
            y.addcmul_(scaled.to(dtype), product.to(dtype))
    # Not shifts of 0 and scales of 1 for tokens of the base: slot 0 may hold anything.
    return torch.where((sets < 0)[:, None], base, y) if slots else base


def _group_products(
    x: Tensor, index_map: Tensor, table: Tensor, hash_seed: int | None, backend: str | None
) -> Iterator[Tensor]:
    """Yield the product of the base with each group of columns, float [tokens, out_features]."""
    groups, bits = table.shape[1], bits_of(table)
    width = x.shape[1] // groups
    if groups == 1:
        yield lut_linear(x, index_map, table, hash_seed=hash_seed, backend=backend)
    elif hash_seed is None and width * bits % 8 == 0:
        for group in range(groups):
            first, size = group * width, width * bits // 8
            codes = index_map[:, group * size : (group + 1) * size].contiguous()
            tables = table[:, group : group + 1].contiguous()
            yield lut_linear(x[:, first : first + width], codes, tables, backend=backend)
    else:
        for group in range(groups):
            columns = slice(group * width, (group + 1) * width)
            alone = torch.zeros_like(x)
            alone[:, columns] = x[:, columns]
            yield lut_linear(alone, index_map, table, hash_seed=hash_seed, backend=backend)
