"""Multiply many tokens with the weights of their experts on a GPU, several experts at a time.

An expert is small: 1536 x 2048 in Qwen3-30B-A3B, which an H100 multiplies with its tokens in a few
microseconds. A loop over experts, with a launch or more and several lines of Python for each, takes
a hundred. So the dense weights of as many experts as fit a budget are looked up in one launch, and
one grouped product multiplies them with all their tokens. The gradients are made the same way.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import load_backend
from .operators import wide

#: Elements of dense weights, or of their gradients, that exist at once: 128 MiB of 16-bit floats.
GROUPED_ELEMENTS = 1 << 26
#: grouped_mm refuses 1024 experts.
_MOST_EXPERTS = 1023
#: grouped_mm needs addresses and strides of whole 16 bytes: 8 elements.
_ALIGNMENT = 8
#: Major compute capabilities with a kernel. Elsewhere grouped_mm is a loop that reads the offsets.
_CAPABILITIES = (9, 10)
_grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm


class Chunk(NamedTuple):
    """Hold the numbers of some experts, and where the tokens of each begin and end.

    `ends` is where they end on the device, counted from the first token of all, int32 [experts].
    """

    experts: slice
    bounds: list[int]
    ends: Tensor

    @property
    def tokens(self) -> slice:
        return slice(self.bounds[0], self.bounds[-1])

    def each(self) -> Iterator[tuple[int, slice]]:
        """Yield the number in the chunk of each expert that has tokens, and all its tokens."""
        for number, (start, end) in enumerate(itertools.pairwise(self.bounds)):
            if start < end:
                yield number, slice(start, end)


def multiply(
    x: Tensor,
    offsets: Tensor,
    index_map: Tensor,
    table: Tensor,
    hash_seed: int | None,
    backend: str,
) -> Tensor:
    """Compute y = x W[e]^T for the tokens of each expert e. It waits for the device.

    `experts.lut_experts` explains the arguments and the result.
    """
    rows, columns = table.shape[1], x.shape[1]
    x, y = _aligned(x), x.new_zeros(x.shape[0], rows)
    for chunk in _chunks(offsets, rows * columns):
        weight = _weight(chunk, x.dtype, index_map, table, columns, hash_seed, backend)
        _products(x, weight.transpose(1, 2), chunk, y)
    return y


def input_grad(
    y_grad: Tensor,
    offsets: Tensor,
    index_map: Tensor,
    table: Tensor,
    in_features: int,
    hash_seed: int | None,
    backend: str,
) -> Tensor:
    """Return the gradient of the inputs, float [tokens, in_features]. It waits for the device."""
    y_grad, x_grad = _aligned(y_grad), y_grad.new_zeros(y_grad.shape[0], in_features)
    for chunk in _chunks(offsets, table.shape[1] * in_features):
        weight = _weight(chunk, y_grad.dtype, index_map, table, in_features, hash_seed, backend)
        _products(y_grad, weight, chunk, x_grad)
    return x_grad


def table_grad(
    y_grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    index_map: Tensor,
    table: Tensor,
    hash_seed: int | None,
    backend: str,
) -> Tensor:
    """Return the gradient of the tables, float32 or wider. It waits for the device."""
    rows, columns = table.shape[1], x.shape[1]
    y_grad, x = _aligned(y_grad), _aligned(x)
    sums = torch.zeros(table.shape, dtype=wide(x.dtype), device=x.device)
    for chunk in _chunks(offsets, rows * columns):
        count = len(chunk.bounds) - 1
        if _is_grouped(y_grad.dtype, x.device, rows, columns):
            tokens = chunk.tokens
            grad = _grouped_mm(y_grad[tokens].T, x[tokens], offs=chunk.ends)
        else:
            grad = x.new_zeros(count, rows, columns)
            for number, tokens in chunk.each():
                torch.mm(y_grad[tokens].T, x[tokens], out=grad[number])
        found = load_backend(backend).table_grad(
            grad.reshape(count * rows, columns),
            index_map[chunk.experts].flatten(0, 1),
            table[chunk.experts].flatten(0, 1),
            hash_seed=hash_seed,
            first_row=chunk.experts.start * rows,
        )
        # What a grouped product leaves for an expert without tokens is not defined.
        used = [number for number, _ in chunk.each()]
        sums[chunk.experts][used] = found.view(count, *table.shape[1:])[used]
    return sums


def _chunks(offsets: Tensor, elements: int) -> Iterator[Chunk]:
    """Yield the experts in chunks, except those without tokens at either end of a chunk.

    Args:
        offsets: Offsets of `lut_experts`.
        elements: Elements of a dense weight.
    """
    bounds = offsets.tolist()
    most = min(max(1, GROUPED_ELEMENTS // elements), _MOST_EXPERTS)
    last = len(bounds) - 1
    first = 0
    while first < last:
        if bounds[first] == bounds[first + 1]:
            first += 1
            continue
        end = min(first + most, last)
        while bounds[end - 1] == bounds[end]:
            end -= 1
        ends = (offsets[first + 1 : end + 1] - bounds[first]).int()
        yield Chunk(slice(first, end), bounds[first : end + 1], ends)
        first = end


def _weight(
    chunk: Chunk,
    dtype: torch.dtype,
    index_map: Tensor,
    table: Tensor,
    in_features: int,
    hash_seed: int | None,
    backend: str,
) -> Tensor:
    """Return the dense weights of the experts of a chunk, [experts, out_features, in_features]."""
    rows = table.shape[1]
    dense = load_backend(backend).dequantize(
        index_map[chunk.experts].flatten(0, 1),
        # Cast the table and not the weight: 2^bits values per group instead of one per column.
        table[chunk.experts].flatten(0, 1).to(dtype),
        in_features,
        hash_seed=hash_seed,
        first_row=chunk.experts.start * rows,
    )
    return dense.view(-1, rows, in_features)


def _products(x: Tensor, weights: Tensor, chunk: Chunk, y: Tensor) -> None:
    """Write the products of a chunk's tokens with the weights of their experts.

    Args:
        x: Inputs of all tokens, float [tokens, K].
        weights: Weights of the chunk's experts, [experts, K, N], in the dtype of x.
        chunk: The chunk.
        y: Where the products go, [tokens, N].
    """
    if _is_grouped(x.dtype, x.device, *weights.shape[1:]):
        y[chunk.tokens] = _grouped_mm(x[chunk.tokens], weights, offs=chunk.ends)
        return
    for number, tokens in chunk.each():
        torch.mm(x[tokens], weights[number], out=y[tokens])


def _aligned(tensor: Tensor) -> Tensor:
    """Return a matrix in the layout that a grouped product needs, as a copy if it has another.

    The gradient of a sum, for example, is a single number with strides of zero.
    """
    # A matrix of one row is contiguous with any stride, so `contiguous` would not copy it.
    rows = tensor.stride() == (tensor.shape[1], 1)
    if rows and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _is_grouped(dtype: torch.dtype, device: torch.device, *sizes: int) -> bool:
    """Return whether torch has a kernel for grouped products, and not only a loop of its own."""
    aligned = all(size % _ALIGNMENT == 0 for size in sizes)
    return dtype == torch.bfloat16 and aligned and _has_kernel(device)


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    # torch for ROCm calls its devices so, too. torch for Windows is built without the kernel.
    if device.type != "cuda" or torch.version.hip is not None or sys.platform != "linux":
        return False
    return torch.cuda.get_device_capability(device)[0] in _CAPABILITIES
