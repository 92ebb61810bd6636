"""Compute with the rows of a layer in vLLM, which may consist of several sketches.

Consecutive rows with equal bits and groups are one product. So the joined query, key and value
projections are one product if they were sketched alike, and up to three if not. Rows that were left
dense are a product with a dense weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from spallm_kernels import dequantize, lut_linear, lut_linear_sets

from .labels import Run, StoredWeights


@dataclass
class Product:
    """Describe consecutive rows of a layer that are computed together.

    Attributes:
        weight: Name of the layer's parameter: packed codes, uint8 [rows, row_bytes], or the dense
            weight, float [rows, columns].
        table: Name of the parameter with the tables, float [rows, groups, 2^bits]. None: dense.
        runs: The stored rows that it consists of, in order.
        slots: Name of the buffer with the tables of sets, float [sets, rows, groups, 2^bits]. None:
            requests have no tables of their own.
    """

    weight: str
    table: str | None
    runs: list[Run] = field(default_factory=list)
    slots: str | None = None

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return sum(len(run.rows) for run in self.runs)


@dataclass
class _Piece:
    """Hold rows that were read: codes and tables, or a dense weight."""

    run: Run
    weight: Tensor
    table: Tensor | None

    @property
    def kind(self) -> tuple[int, ...]:
        """Return what must be equal in the pieces of one product."""
        return () if self.table is None else tuple(self.table.shape[1:])


def make_products(
    layer: nn.Module,
    labels: Tensor,
    stored: StoredWeights,
    columns: range,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Product]:
    """Read the rows of a layer and register their parameters.

    The parameters are called `weight` and `weight_table`; further products have numbers behind.

    Args:
        layer: The layer. It must not have these parameters.
        labels: The labels of its rows, int64 [rows].
        stored: The stored weights.
        columns: The columns of the weights that the layer has.
        dtype: Dtype of activations, and of the tables.
        device: Device of the parameters.

    Returns:
        The products, in the order of the rows.
    """
    groups: list[list[_Piece]] = []
    for piece in _pieces(labels, stored, columns, dtype):
        if not groups or groups[-1][0].kind != piece.kind:
            groups.append([])
        groups[-1].append(piece)
    products = []
    for number, pieces in enumerate(groups):
        suffix = f"_{number}" if number else ""
        product = Product(f"weight{suffix}", None, [piece.run for piece in pieces])
        _register(layer, product.weight, [piece.weight for piece in pieces], device)
        tables = [piece.table for piece in pieces if piece.table is not None]
        if tables:
            product.table = f"weight_table{suffix}"
            _register(layer, product.table, tables, device)
        products.append(product)
    return products


def multiply(
    layer: nn.Module,
    products: list[Product],
    x: Tensor,
    bias: Tensor | None = None,
    sets: Tensor | None = None,
) -> Tensor:
    """Return the products of a layer, [..., rows], plus a bias.

    Args:
        layer: The layer that has the parameters.
        products: Its products.
        x: Inputs, float [..., columns].
        bias: Float [rows], or None.
        sets: The slot of each token, int64 [at least the number of tokens]; -1 is the base. It
            matters if products have slots.
    """
    if len(products) == 1:
        return _multiply(layer, products[0], x, bias, sets)
    y = torch.cat([_multiply(layer, product, x, None, sets) for product in products], dim=-1)
    return y if bias is None else y + bias


def dense_weight(layer: nn.Module, products: list[Product], columns: int) -> Tensor:
    """Return the dense weight of a layer, [rows, columns].

    Args:
        layer: The layer that has the parameters.
        products: Its products.
        columns: Columns of the weight.
    """
    parts = []
    for product in products:
        weight = getattr(layer, product.weight)
        if product.table is not None:
            weight = dequantize(weight, getattr(layer, product.table), columns)
        parts.append(weight)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _multiply(
    layer: nn.Module, product: Product, x: Tensor, bias: Tensor | None, sets: Tensor | None
) -> Tensor:
    weight = getattr(layer, product.weight)
    if product.table is None:
        return functional.linear(x, weight, bias)
    table = getattr(layer, product.table)
    if product.slots is None or sets is None:
        return lut_linear(x, weight, table, bias)
    return lut_linear_sets(
        x, weight, table, getattr(layer, product.slots), sets[: x.shape[0]], bias
    )


def _pieces(
    labels: Tensor, stored: StoredWeights, columns: range, dtype: torch.dtype
) -> Iterator[_Piece]:
    """Read rows. Absent ones look like those before them, with tables of zeros."""
    last: _Piece | None = None
    absent: list[Run] = []
    for run in stored.runs(labels):
        if run.weight is None:
            if last is None:
                absent.append(run)  # they take the kind of the rows behind them
                continue
            piece = _absent(run, last)
        elif run.weight in stored.modules:
            packed, table = stored.read_sketched(run, columns)
            piece = _Piece(run, packed, table.to(dtype))
        else:
            piece = _Piece(run, stored.read_dense(run, columns).to(dtype), None)
        yield from (_absent(before, piece) for before in absent)
        absent = []
        last = piece
        yield piece


def _absent(run: Run, like: _Piece) -> _Piece:
    count = len(run.rows)
    weight = like.weight.new_zeros(count, like.weight.shape[1])
    table = None if like.table is None else like.table.new_zeros(count, *like.table.shape[1:])
    return _Piece(run, weight, table)


def _register(layer: nn.Module, name: str, parts: list[Tensor], device: torch.device) -> None:
    joined = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)
    layer.register_parameter(name, nn.Parameter(joined.to(device), requires_grad=False))
