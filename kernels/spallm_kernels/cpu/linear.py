"""Compute the sketched linear layer on the CPU: in vector registers, or else in portable loops.

`vectorized.py` serves 2, 3 and 4 bits on processors with AVX2, AVX-512 or NEON. On those with AMX,
`matrix.py` serves bfloat16 inputs of several tokens. `portable.py` serves everything else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import bins, matrix, panels, portable, vectorized
from .vector_units import PORTABLE, host_unit

#: The most tokens to decode for, for float32 inputs and for 16-bit ones, by
#: `benchmarks/cpu/linear.py`: in portable loops, with hashed codes, and with stored codes in vector
#: registers.
PORTABLE_TOKENS = (32, 8)
HASHED_TOKENS = (48, 16)
STORED_TOKENS = (math.inf, 32)
#: The same for stored codes beside AMX: the library's float32 products are faster there.
BESIDE_MATRIX_TOKENS = (64, 32)
#: The most tokens to decode for in tile registers.
MATRIX_TOKENS = 256
_SINGLE_OR_LESS = (torch.float32, torch.float16, torch.bfloat16)


def can_decode(x: Tensor, table: Tensor) -> bool:
    """Return whether `decode` supports such tensors: it computes in float32."""
    return x.dtype in _SINGLE_OR_LESS


def decode_tokens(x: Tensor, table: Tensor, *, hashed: bool) -> float:
    """Return the most tokens for which `decode` is the faster path (`benchmarks/cpu/linear.py`).

    In vector registers, float32 products are as fast as those of a library with a dense weight,
    whatever their number, unless the processor has AMX. Products of 16-bit inputs are faster in the
    library than in vector registers.
    """
    if matrix.supports(x, table, 0 if hashed else None):
        return MATRIX_TOKENS
    return vector_tokens(x, table, hashed=hashed)


def vector_tokens(x: Tensor, table: Tensor, *, hashed: bool) -> float:
    """Return what `decode_tokens` would return if nothing were computed in tile registers."""
    unit = host_unit()
    limits: tuple[float, float] = HASHED_TOKENS if hashed else STORED_TOKENS
    if path_name(table, x.shape[1], 0 if hashed else None) == PORTABLE:
        limits = PORTABLE_TOKENS
    elif unit is not None and unit.has_matrix and not hashed:
        limits = BESIDE_MATRIX_TOKENS
    single, half = limits
    return single if x.dtype == torch.float32 else half


def path_name(table: Tensor, in_features: int, hash_seed: int | None = None) -> str:
    """Return what computes with a sketch on this machine: a vector unit's name, or `portable`.

    Args:
        table: Tables, float [out_features, groups, 2^bits].
        in_features: Columns of the weight.
        hash_seed: Seed of the `hash` mapping; None if codes are stored.
    """
    unit = host_unit()
    supported = unit is not None and vectorized.supports(table, in_features, hash_seed)
    return unit.name if unit is not None and supported else PORTABLE


def decode(
    x: Tensor,
    index_map: Tensor,
    table: Tensor,
    bias: Tensor | None = None,
    *,
    hash_seed: int | None = None,
) -> Tensor:
    """Compute y = x W^T + bias without a dense weight. Products are summed in float32.

    Args:
        x: float [tokens, in_features].
        index_map: Packed codes, uint8 [out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables, any float [out_features, groups, 2^bits], rounded to the dtype of x.
        bias: Float [out_features], or None.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.

    Returns:
        y [tokens, out_features], in the dtype of x.
    """
    dtype = x.dtype
    if dtype != torch.float32 and table.dtype not in vectorized.KINDS:
        table = table.to(dtype)
    if matrix.supports(x, table, hash_seed):
        return matrix.decode(x, index_map, table, bias)
    if vectorized.supports(table, x.shape[1], hash_seed):
        return vectorized.decode(x, index_map, table, hash_seed, bias)
    if dtype != torch.float32:
        table, x = table.to(dtype), x.float()
    y = portable.decode(x, index_map, table, hash_seed)
    if bias is not None:
        y += bias
    return y if dtype == torch.float32 else y.to(dtype)


def dequantize(
    index_map: Tensor,
    table: Tensor,
    in_features: int,
    *,
    hash_seed: int | None = None,
    first_row: int = 0,
) -> Tensor:
    """Return the dense weight of a sketch.

    Args:
        index_map: Packed codes, uint8 [out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables, float [out_features, groups, 2^bits].
        in_features: Columns of the weight.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        first_row: Number of the first row in the module, for the hash.

    Returns:
        The weight [out_features, in_features], in the dtype of the table.
    """
    vectorizes = vectorized.supports(table, in_features, hash_seed)
    look_up = vectorized.dequantize if vectorizes else portable.dequantize
    return look_up(index_map, table, in_features, hash_seed, first_row)


def table_grad(
    weight_grad: Tensor,
    index_map: Tensor,
    table: Tensor,
    *,
    hash_seed: int | None = None,
    first_row: int = 0,
) -> Tensor:
    """Return the gradient of the tables, given the gradient of the dense weight.

    Args:
        weight_grad: Float [out_features, in_features].
        index_map: Packed codes, uint8 [out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables, float [out_features, groups, 2^bits].
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        first_row: Number of the first row in the module, for the hash.

    Returns:
        The gradient in the shape of the table: for each entry the sum over the weights that use it,
        in float32 or wider.
    """
    if hash_seed is None and bins.supports(table, weight_grad):
        return bins.table_grad(weight_grad, index_map, table)
    return portable.table_grad(weight_grad, index_map, table, hash_seed, first_row)


def can_differentiate(
    y_grad: Tensor, table: Tensor, in_features: int, hash_seed: int | None
) -> bool:
    """Return whether `input_grad` and `product_table_grad` support such tensors."""
    return panels.supports(y_grad, table, in_features, hash_seed)


def input_grad(y_grad: Tensor, index_map: Tensor, table: Tensor, in_features: int) -> Tensor:
    """Return the gradient of a product's inputs without a dense weight.

    Args:
        y_grad: Gradient of the products, float32 [tokens, out_features].
        index_map: Packed codes, uint8 [out_features, row_bytes].
        table: Tables, float [out_features, groups, 2^bits].
        in_features: Columns of the weight.

    Returns:
        float32 [tokens, in_features].
    """
    return panels.input_grad(y_grad, index_map, table, in_features)


def product_table_grad(y_grad: Tensor, x: Tensor, index_map: Tensor, table: Tensor) -> Tensor:
    """Return the gradient of a product's tables without the gradient of a dense weight.

    Args:
        y_grad: Gradient of the products, float32 [tokens, out_features].
        x: Inputs of the product, float32 [tokens, in_features].
        index_map: Packed codes, uint8 [out_features, row_bytes].
        table: Tables, float [out_features, groups, 2^bits].

    Returns:
        float32 [out_features, groups, 2^bits].
    """
    return panels.table_grad(y_grad, x, index_map, table)
