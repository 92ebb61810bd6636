"""Multiply tokens with one sketched weight, each with the tables of its tenant (`lut_linear_sets`).

Tenants share the packed codes. What differs is a set of tables, which is a few hundredths of the
weight. It is inference only: tables are trained by `lut_linear`, one set at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .dispatch import choose_backend
from .linear import check_shapes
from .operators import bits_of, product, register, shaped
from .set_decoders import load_set_decoder

_INTEGERS = (torch.int64, torch.int32)


def lut_linear_sets(
    x: Tensor,
    index_map: Tensor,
    table: Tensor,
    tables: Tensor,
    sets: Tensor,
    bias: Tensor | None = None,
    *,
    hash_seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute y[t] = x[t] W[sets[t]]^T + bias, where sketched weights W differ in tables only.

    There are no derivatives. Under autocast, x is first cast to autocast's dtype, unless it is
    float64.

    On the CPU, the result for a token is the result of `lut_linear` with its tables. In float32, as
    long as `lut_linear` decodes in vector registers, it has the same bits, whatever other tokens
    there are. If all tokens have one set, `lut_linear` computes them.

    On a GPU, a product of 16-bit inputs with up to 512 tokens is three launches that do not wait
    for the device, so a CUDA graph can hold it; during capture, this holds for any number of
    tokens. How many sets the tokens have decides on the device in which of two ways it is
    computed, so the last bits of a token's result depend on the others.
    More tokens, and other tensors, read `sets` on the host first: each set with more than 64 tokens
    then gets a dense weight, one after another (16 tokens if codes are hashed).

    Args:
        x: Inputs, float [..., in_features].
        index_map: Packed codes of all sets, uint8 [out_features, row_bytes]; [out_features, 0] with
            `hash_seed`.
        table: Tables of the base, float [out_features, groups, 2^bits].
        tables: Tables of the other sets, float [slots, out_features, groups, 2^bits]. If its dtype
            is not that of `table`, both are copied to a common one in each call.
        sets: Number of the slot of each token, int64 or int32 [...] on the device of x; -1 for the
            base. Slots that no token names may hold anything. On a GPU values are not checked: the
            result for a token with another number is undefined.
        bias: Float [out_features], or None.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        backend: `cpu`, `portable`, `reference` or `triton`; by default the fastest one (see
            `dispatch.py`).

    Returns:
        y [..., out_features], computed in the dtype of x.

    Raises:
        TypeError: If x is not floating point, or sets are not integers of 32 or 64 bits.
        ValueError: If the shapes cannot match, the backend cannot be used, or, on the CPU, a set
            does not exist.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, found {x.dtype}")
    if sets.dtype not in _INTEGERS:
        raise TypeError(f"sets must be int64 or int32, found {sets.dtype}")
    check_shapes(x.shape[-1], index_map, table, hash_seed)
    if tables.dim() != 4 or tables.shape[1:] != table.shape:
        raise ValueError(
            f"tables must be [slots, {', '.join(map(str, table.shape))}], "
            f"found {list(tables.shape)}"
        )
    if sets.shape != x.shape[:-1]:
        raise ValueError(f"sets must be {list(x.shape[:-1])}, found {list(sets.shape)}")
    device = x.device.type
    # As in `lut_linear`.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return _product(x, index_map, table, tables, sets, bias, hash_seed, backend)
    x = x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _product(x, index_map, table, tables, sets, bias, hash_seed, backend)


def _product(
    x: Tensor,
    index_map: Tensor,
    table: Tensor,
    tables: Tensor,
    sets: Tensor,
    bias: Tensor | None,
    hash_seed: int | None,
    backend: str | None,
) -> Tensor:
    if bias is not None:
        bias = bias.to(x.dtype)
    multiply = torch.ops.spallm.lut_linear_sets.default
    y: Tensor = multiply(x, index_map, table, tables, sets, bias, hash_seed, backend)
    return y


def _lut_linear_sets(
    x: Tensor,
    index_map: Tensor,
    table: Tensor,
    tables: Tensor,
    sets: Tensor,
    bias: Tensor | None,
    hash_seed: int | None,
    backend: str | None,
) -> Tensor:
    name = choose_backend(x.device, bits_of(table), backend)
    if x.device.type == "cpu":
        _check_sets(sets, tables.shape[0])
    common = torch.promote_types(table.dtype, tables.dtype)
    table, tables = table.to(common), tables.to(common)
    tokens, flat = x.reshape(-1, x.shape[-1]), sets.reshape(-1)
    decoder, hashed = load_set_decoder(name), hash_seed is not None
    decodes = decoder.can_decode(tokens, table, hashed=hashed)
    if not tokens.shape[0]:
        y = x.new_empty(0, table.shape[0])
    elif decodes and not decoder.counts_first(tokens):
        y = decoder.decode(tokens, flat, index_map, table, tables, bias, hash_seed=hash_seed)
    else:
        most = decoder.most_tokens(tokens, table, hashed=hashed) if decodes else 0
        y = _by_set(tokens, flat, index_map, table, tables, bias, hash_seed, name, most)
    return shaped(y, *x.shape[:-1], table.shape[0])


def _by_set(
    x: Tensor,
    sets: Tensor,
    index_map: Tensor,
    table: Tensor,
    tables: Tensor,
    bias: Tensor | None,
    hash_seed: int | None,
    name: str,
    most: float,
) -> Tensor:
    """Multiply each set that has more than `most` tokens alone, and all others in one call.

    It waits for the device. See `lut_linear_sets` for the other arguments; `name` is that of the
    backend.
    """
    on_host = sets.cpu().numpy()
    decoder = load_set_decoder(name)
    if (on_host == on_host[0]).all():
        own = _own(table, tables, int(on_host[0]))
        return product(x, index_map, own, bias, hash_seed, name, None)
    if len(on_host) <= most:
        return decoder.decode(x, sets, index_map, table, tables, bias, hash_seed=hash_seed)
    y = x.new_empty(x.shape[0], table.shape[0])
    few = []
    for number, tokens in _used(sets, on_host):
        if len(tokens) <= most:
            few.append(tokens)
        else:
            own = _own(table, tables, number)
            y[tokens] = product(x[tokens], index_map, own, bias, hash_seed, name, None)
    if few:
        tokens = torch.cat(few)
        chosen = x[tokens], sets[tokens]
        y[tokens] = decoder.decode(*chosen, index_map, table, tables, bias, hash_seed=hash_seed)
    return y


def _used(sets: Tensor, on_host: Any) -> Iterator[tuple[int, Tensor]]:
    """Yield the sets that have tokens, with the numbers of their tokens."""
    numbers, counts = np.unique(on_host, return_counts=True)
    order = torch.argsort(sets, stable=True)
    yield from zip(numbers.tolist(), torch.split(order, counts.tolist()), strict=True)


def _own(table: Tensor, tables: Tensor, number: int) -> Tensor:
    """Return the tables of a set."""
    return table if number < 0 else tables[number]


def _check_sets(sets: Tensor, slots: int) -> None:
    """Raise ValueError for sets with which a backend would read beyond the tables."""
    numbers = sets.numpy()
    if numbers.size and (numbers.min() < -1 or numbers.max() >= slots):
        raise ValueError(
            f"sets must be from -1 to {slots - 1}, found {numbers.min()} to {numbers.max()}"
        )


def _no_derivative(ctx: Any, *gradients: Tensor) -> Any:
    """Raise NotImplementedError."""
    raise NotImplementedError(
        "products with sets of tables have no derivative; train the tables of one set by lut_linear"
    )


def _lut_linear_sets_shape(x: Tensor, index_map: Tensor, table: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], table.shape[0])


register(
    "lut_linear_sets(Tensor x, Tensor index_map, Tensor table, Tensor tables, Tensor sets, "
    "Tensor? bias, int? hash_seed, str? backend) -> Tensor",
    _lut_linear_sets,
    _lut_linear_sets_shape,
    _no_derivative,
)
