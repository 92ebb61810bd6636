"""Define the sketched linear layer as torch operators, `torch.ops.spallm`, for torch.compile.

To torch.compile each operator is a single node with known shapes, whatever runs inside.
`Library.define` and `impl` cost less per call than `torch.library.custom_op`; for one token of one
layer the difference would be noticeable.

Neither pass keeps a dense weight for the other. The forward pass saves its inputs only; the
backward pass looks the weight up again, and holds the gradient of the weight for one block of rows
at a time. On the CPU, the weight too is looked up for one block of rows at a time, which stays in
the cache; with vector instructions, neither of them exists there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .dispatch import (
    choose_backend,
    choose_differentiator,
    choose_path,
    load_backend,
    load_decoder,
)

#: Elements of the dense weight's gradient that exist at once in the backward pass: 64 MiB of
#: 16-bit floats. On an H100, products over fewer rows (1024 of 14336 columns) take 10 % longer.
GRAD_ELEMENTS = 1 << 25
#: Elements of the dense weight, and of its gradient, that exist at once on the CPU: 4 MiB of 32-bit
#: floats, which stay in the cache. Smaller blocks take longer (`benchmarks/cpu/linear.py`).
CPU_ELEMENTS = 1 << 20
_ALIGNMENT = 128  # rows; blocks are then whole tiles of the library's matrix product


def product(
    x: Tensor,
    index_map: Tensor,
    table: Tensor,
    bias: Tensor | None,
    hash_seed: int | None,
    backend: str | None,
    path: str | None,
    first_row: int = 0,
) -> Tensor:
    """Return the product with a sketched weight.

    `linear.lut_linear` explains the other arguments.

    Args:
        first_row: Number of the first row in the module, for the hash.
    """
    name = choose_backend(x.device, bits_of(table), backend)
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    hashed = hash_seed is not None
    # No backend decodes hashed rows that are not numbered from zero.
    chosen = "dense" if hashed and first_row else path
    if choose_path(name, tokens, table, hashed=hashed, path=chosen) == "decode":
        y = load_decoder(name).decode(tokens, index_map, table, bias, hash_seed=hash_seed)
    else:
        y = x.new_empty(tokens.shape[0], table.shape[0])
        block = _elements(x.device, sys.maxsize)
        for rows, weight in _weights(
            name, x.dtype, index_map, table, x.shape[-1], hash_seed, block, first_row
        ):
            if bias is None:
                torch.mm(tokens, weight.T, out=y[:, rows])
            else:
                torch.addmm(bias[rows], tokens, weight.T, out=y[:, rows])
    return y if x.dim() == 2 else shaped(y, *x.shape[:-1], table.shape[0])


def _dequantize(
    index_map: Tensor, table: Tensor, in_features: int, hash_seed: int | None, backend: str | None
) -> Tensor:
    chosen = load_backend(choose_backend(table.device, bits_of(table), backend))
    return chosen.dequantize(index_map, table, in_features, hash_seed=hash_seed)


def input_grad(
    y_grad: Tensor,
    index_map: Tensor,
    table: Tensor,
    in_features: int,
    hash_seed: int | None,
    backend: str | None,
    first_row: int = 0,
) -> Tensor:
    """Return the gradient of a product's inputs. See `product` for the arguments."""
    name = choose_backend(y_grad.device, bits_of(table), backend)
    y_rows = y_grad.reshape(-1, y_grad.shape[-1])
    fused = choose_differentiator(name, y_rows, table, in_features, hash_seed)
    if fused is not None:
        x_grad = fused.input_grad(y_rows, index_map, table, in_features)
        return shaped(x_grad, *y_grad.shape[:-1], in_features)
    # Sums in 16 bits would be rounded once per block.
    block = _elements(y_grad.device, sys.maxsize) if y_grad.element_size() > 2 else sys.maxsize
    # The first block overwrites what is there; without rows there is none.
    new = y_grad.new_empty if table.shape[0] else y_grad.new_zeros
    x_grad = new(y_rows.shape[0], in_features)
    for rows, weight in _weights(
        name, y_grad.dtype, index_map, table, in_features, hash_seed, block, first_row
    ):
        x_grad = x_grad.addmm_(y_rows[:, rows], weight, beta=float(rows.start > 0))
    return shaped(x_grad, *y_grad.shape[:-1], in_features)


def table_grad(
    y_grad: Tensor,
    x: Tensor,
    index_map: Tensor,
    table: Tensor,
    hash_seed: int | None,
    backend: str | None,
    first_row: int = 0,
) -> Tensor:
    """Return the gradient of a product's tables. See `product` for the arguments."""
    name = choose_backend(x.device, bits_of(table), backend)
    y_rows, x_rows = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (y_grad, x))
    fused = choose_differentiator(name, y_rows, table, x.shape[-1], hash_seed)
    if fused is not None:
        return fused.product_table_grad(y_rows, x_rows, index_map, table)
    chosen = load_backend(name)
    block = _elements(x.device, GRAD_ELEMENTS)
    parts = [
        chosen.table_grad(
            y_rows[:, rows].T @ x_rows,
            index_map[rows],
            table[rows],
            hash_seed=hash_seed,
            first_row=first_row + rows.start,
        )
        for rows in _blocks(table.shape[0], x.shape[-1], block)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index_map, table, bias, ctx.hash_seed, ctx.backend, _ = inputs
    ctx.save_for_backward(x, index_map, table)
    ctx.has_bias = bias is not None


def _lut_linear_backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor | None, ...]:
    x, index_map, table = ctx.saved_tensors
    how = (ctx.hash_seed, ctx.backend)
    x_grad = table_grad = bias_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = torch.ops.spallm.input_grad(y_grad, index_map, table, x.shape[-1], *how)
    if ctx.needs_input_grad[2]:
        table_grad = torch.ops.spallm.table_grad(y_grad, x, index_map, table, *how)
        table_grad = table_grad.to(table.dtype)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        bias_grad = y_grad.reshape(-1, y_grad.shape[-1]).sum(0)
    return x_grad, None, table_grad, bias_grad, None, None, None


def no_second_derivative(ctx: Any, *gradients: Tensor) -> Any:
    """Raise NotImplementedError."""
    raise NotImplementedError("second derivatives of a sketched product are not supported")


def _lut_linear_shape(x: Tensor, index_map: Tensor, table: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], table.shape[0])


def _dequantize_shape(index_map: Tensor, table: Tensor, in_features: int, *rest: Any) -> Tensor:
    return table.new_empty(table.shape[0], in_features)


def _input_grad_shape(
    y_grad: Tensor, index_map: Tensor, table: Tensor, in_features: int, *rest: Any
) -> Tensor:
    return y_grad.new_empty(*y_grad.shape[:-1], in_features)


def _table_grad_shape(
    y_grad: Tensor, x: Tensor, index_map: Tensor, table: Tensor, *rest: Any
) -> Tensor:
    return table.new_empty(table.shape, dtype=wide(x.dtype))


def shaped(result: Tensor, *shape: int) -> Tensor:
    """Give a fresh result another shape without a copy, and without becoming a view of it.

    Autograd refuses to change views in place if an operator returns them, as in `y += residual`.

    Args:
        result: The result of an operator.
        shape: Its new shape.
    """
    reshaped: Tensor = torch.ops.aten._unsafe_view.default(result, shape)
    return reshaped


def _weights(
    name: str,
    dtype: torch.dtype,
    index_map: Tensor,
    table: Tensor,
    in_features: int,
    hash_seed: int | None,
    elements: int,
    first_row: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows of the dense weight, with at most about this number of elements."""
    # Cast the table and not the weight: 2^bits values per group instead of one per column.
    table, backend = table.to(dtype), load_backend(name)
    for rows in _blocks(table.shape[0], in_features, elements):
        yield (
            rows,
            backend.dequantize(
                index_map[rows],
                table[rows],
                in_features,
                hash_seed=hash_seed,
                first_row=first_row + rows.start,
            ),
        )


def _blocks(rows: int, columns: int, elements: int) -> list[slice]:
    """Return slices of rows, each with at most about this number of elements."""
    step = max(1, elements // columns)
    step -= step % _ALIGNMENT if step > _ALIGNMENT else 0
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _elements(device: torch.device, otherwise: int) -> int:
    """Return the elements of a block on a device."""
    return CPU_ELEMENTS if device.type == "cpu" else otherwise


def bits_of(table: Tensor) -> int:
    """Return the bits of a code, given the tables, whose last dimension is 2^bits."""
    return table.shape[-1].bit_length() - 1


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which gradients are summed: float32, or wider."""
    return torch.promote_types(dtype, torch.float32)


_library: Any = torch.library.Library("spallm", "DEF")  # type: ignore[no-untyped-call]


def register(
    schema: str,
    implementation: Callable[..., Tensor],
    shape: Callable[..., Tensor],
    backward: Callable[..., Any] | None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Register an operator, its shape function (for tensors without data) and its derivative.

    Args:
        schema: Name and arguments of the operator, as `torch.library.define` takes them.
        implementation: What it computes, on any device.
        shape: Function of the same arguments that returns an empty tensor like the result.
        backward: Derivative, as `torch.library.register_autograd` takes it. None: there is none.
        setup_context: What keeps the inputs for the derivative.
    """
    _library.define(schema)
    name = schema.partition("(")[0]
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spallm::{name}", shape, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"spallm::{name}", backward, setup_context=setup_context, lib=_library
        )


register(
    "lut_linear(Tensor x, Tensor index_map, Tensor table, Tensor? bias, int? hash_seed, "
    "str? backend, str? path) -> Tensor",
    product,
    _lut_linear_shape,
    _lut_linear_backward,
    _save_inputs,
)
register(
    "dequantize(Tensor index_map, Tensor table, int in_features, int? hash_seed, str? backend) "
    "-> Tensor",
    _dequantize,
    _dequantize_shape,
    None,
)
register(
    "input_grad(Tensor y_grad, Tensor index_map, Tensor table, int in_features, int? hash_seed, "
    "str? backend) -> Tensor",
    input_grad,
    _input_grad_shape,
    no_second_derivative,
)
register(
    "table_grad(Tensor y_grad, Tensor x, Tensor index_map, Tensor table, int? hash_seed, "
    "str? backend) -> Tensor",
    table_grad,
    _table_grad_shape,
    no_second_derivative,
)
