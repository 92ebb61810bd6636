"""Multiply tokens with the sketched weights of the experts that they belong to (`lut_experts`).

For few tokens per expert, one call of the backend serves all experts. For many tokens, and for
gradients, a GPU takes several experts at a time (`grouped.py`). On the CPU, each expert that has
tokens is a sketched layer of its own (see `operators.py`): then a dense weight, or its gradient,
exists for one expert at a time, or for less.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import grouped
from .dispatch import choose_backend, load_experts
from .operators import (
    bits_of,
    input_grad,
    no_second_derivative,
    product,
    register,
    table_grad,
    wide,
)

_INTEGERS = (torch.int64, torch.int32)


def lut_experts(
    x: Tensor,
    offsets: Tensor,
    index_map: Tensor,
    table: Tensor,
    *,
    hash_seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute y = x W[e]^T for the tokens of each expert e, whose weights are sketched.

    The result is differentiable once in x and table. The gradient of the table is summed in float32
    or wider. Under autocast, x is first cast to autocast's dtype, unless it is float64.

    On a GPU, a product of 16-bit inputs with up to 64 tokens per expert on average is one launch
    that does not wait for the device, so a CUDA graph can hold it (16 tokens if codes are hashed).
    More tokens, other tensors, and the backward pass read the offsets on the host first.

    Args:
        x: Inputs, float [tokens, in_features], sorted by expert.
        offsets: Tokens offsets[e] to offsets[e + 1] belong to expert e. int64 or int32
            [experts + 1] on the device of x, ascending from 0 to at most the number of tokens.
            Tokens behind the last offset belong to no expert: their products are zero.
        index_map: Packed codes, uint8 [experts, out_features, row_bytes]; [experts, out_features,
            0] with `hash_seed`.
        table: Tables, float [experts, out_features, groups, 2^bits].
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
            Rows are numbered through all experts.
        backend: `cpu`, `portable`, `reference` or `triton`; by default the fastest one (see
            `dispatch.py`).

    Returns:
        y [tokens, out_features], computed in the dtype of x.

    Raises:
        TypeError: If x is not floating point, or the offsets are not integers of 32 or 64 bits.
        ValueError: If the shapes cannot match, the backend cannot be used, or, on the CPU, the
            offsets do not ascend from 0 to at most the number of tokens.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, found {x.dtype}")
    if offsets.dtype not in _INTEGERS:
        raise TypeError(f"offsets must be int64 or int32, found {offsets.dtype}")
    _check_shapes(x, offsets, index_map, table, hash_seed)
    device = x.device.type
    # As in `lut_linear`.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return _product(x, offsets, index_map, table, hash_seed, backend)
    x = x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _product(x, offsets, index_map, table, hash_seed, backend)


def _product(
    x: Tensor,
    offsets: Tensor,
    index_map: Tensor,
    table: Tensor,
    hash_seed: int | None,
    backend: str | None,
) -> Tensor:
    multiply = torch.ops.spallm.lut_experts.default
    y: Tensor = multiply(x, offsets, index_map, table, hash_seed, backend)
    return y


def _check_shapes(
    x: Tensor, offsets: Tensor, index_map: Tensor, table: Tensor, hash_seed: int | None
) -> None:
    experts, out_features, groups, entries = table.shape
    bits = entries.bit_length() - 1
    if x.dim() != 2 or entries != 1 << bits or x.shape[1] % groups:
        raise ValueError(
            f"x must be [tokens, in_features], and table [experts, out_features, groups, 2^bits] "
            f"with groups that divide the columns, found {list(x.shape)} and {list(table.shape)}"
        )
    least = 0 if hash_seed is not None else -(-x.shape[1] * bits // 8)
    if tuple(index_map.shape[:-1]) != (experts, out_features) or index_map.shape[-1] < least:
        raise ValueError(
            f"index_map must be [{experts}, {out_features}, at least {least} bytes], "
            f"found {list(index_map.shape)}"
        )
    if tuple(offsets.shape) != (experts + 1,):
        raise ValueError(f"offsets must be [{experts + 1}], found {list(offsets.shape)}")


def _lut_experts(
    x: Tensor,
    offsets: Tensor,
    index_map: Tensor,
    table: Tensor,
    hash_seed: int | None,
    backend: str | None,
) -> Tensor:
    name = choose_backend(x.device, bits_of(table), backend)
    if x.device.type == "cpu":
        _check_offsets(offsets, x.shape[0])
    decoder = load_experts(name)
    if x.shape[0] and decoder.can_decode(x, table, hashed=hash_seed is not None):
        return decoder.decode(x, offsets, index_map, table, hash_seed=hash_seed)
    if x.device.type != "cpu":
        return grouped.multiply(x, offsets, index_map, table, hash_seed, name)
    rows = table.shape[1]
    y = x.new_zeros(x.shape[0], rows)
    for expert, tokens in _used(offsets):
        sketch = index_map[expert], table[expert]
        y[tokens] = product(x[tokens], *sketch, None, hash_seed, name, None, expert * rows)
    return y


def _experts_input_grad(
    y_grad: Tensor,
    offsets: Tensor,
    index_map: Tensor,
    table: Tensor,
    in_features: int,
    hash_seed: int | None,
    backend: str | None,
) -> Tensor:
    name = choose_backend(y_grad.device, bits_of(table), backend)
    if y_grad.device.type != "cpu":
        how = (in_features, hash_seed, name)
        return grouped.input_grad(y_grad, offsets, index_map, table, *how)
    x_grad = y_grad.new_zeros(y_grad.shape[0], in_features)
    for expert, tokens in _used(offsets):
        sketch = index_map[expert], table[expert], in_features
        first_row = expert * table.shape[1]
        x_grad[tokens] = input_grad(y_grad[tokens], *sketch, hash_seed, name, first_row)
    return x_grad


def _experts_table_grad(
    y_grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    index_map: Tensor,
    table: Tensor,
    hash_seed: int | None,
    backend: str | None,
) -> Tensor:
    name = choose_backend(x.device, bits_of(table), backend)
    if x.device.type != "cpu":
        return grouped.table_grad(y_grad, x, offsets, index_map, table, hash_seed, name)
    sums = torch.zeros(table.shape, dtype=wide(x.dtype), device=x.device)
    for expert, tokens in _used(offsets):
        sketch = index_map[expert], table[expert]
        first_row = expert * table.shape[1]
        sums[expert] = table_grad(y_grad[tokens], x[tokens], *sketch, hash_seed, name, first_row)
    return sums


def _check_offsets(offsets: Tensor, tokens: int) -> None:
    """Raise ValueError for offsets with which a backend would read beyond the tokens."""
    ascending = bool((offsets[1:] >= offsets[:-1]).all())
    if not ascending or offsets[0] != 0 or offsets[-1] > tokens:
        raise ValueError(
            f"offsets must ascend from 0 to at most {tokens} tokens, found {offsets.tolist()}"
        )


def _used(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield the experts that have tokens, with their tokens. It waits for the device."""
    for expert, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if start < end:
            yield expert, slice(start, end)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, index_map, table, ctx.hash_seed, ctx.backend = inputs
    ctx.save_for_backward(x, offsets, index_map, table)


def _lut_experts_backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor | None, ...]:
    x, offsets, index_map, table = ctx.saved_tensors
    how = (ctx.hash_seed, ctx.backend)
    x_grad = grad = None
    if ctx.needs_input_grad[0]:
        x_grad = torch.ops.spallm.experts_input_grad(
            y_grad, offsets, index_map, table, x.shape[1], *how
        )
    if ctx.needs_input_grad[3]:
        grad = torch.ops.spallm.experts_table_grad(y_grad, x, offsets, index_map, table, *how)
        grad = grad.to(table.dtype)
    return x_grad, None, None, grad, None, None


def _lut_experts_shape(
    x: Tensor, offsets: Tensor, index_map: Tensor, table: Tensor, *rest: Any
) -> Tensor:
    return x.new_empty(x.shape[0], table.shape[1])


def _input_grad_shape(
    y_grad: Tensor,
    offsets: Tensor,
    index_map: Tensor,
    table: Tensor,
    in_features: int,
    *rest: Any,
) -> Tensor:
    return y_grad.new_empty(y_grad.shape[0], in_features)


def _table_grad_shape(
    y_grad: Tensor, x: Tensor, offsets: Tensor, index_map: Tensor, table: Tensor, *rest: Any
) -> Tensor:
    return table.new_empty(table.shape, dtype=wide(x.dtype))


register(
    "lut_experts(Tensor x, Tensor offsets, Tensor index_map, Tensor table, int? hash_seed, "
    "str? backend) -> Tensor",
    _lut_experts,
    _lut_experts_shape,
    _lut_experts_backward,
    _save_inputs,
)
register(
    "experts_input_grad(Tensor y_grad, Tensor offsets, Tensor index_map, Tensor table, "
    "int in_features, int? hash_seed, str? backend) -> Tensor",
    _experts_input_grad,
    _input_grad_shape,
    no_second_derivative,
)
register(
    "experts_table_grad(Tensor y_grad, Tensor x, Tensor offsets, Tensor index_map, Tensor table, "
    "int? hash_seed, str? backend) -> Tensor",
    _experts_table_grad,
    _table_grad_shape,
    no_second_derivative,
)
