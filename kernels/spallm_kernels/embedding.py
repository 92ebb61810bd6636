"""Look up rows of a sketched weight (`lut_embedding`), as an embedding does with token ids.

Only the rows of the given ids are decoded: their packed codes and tables are gathered and become a
small sketch of their own, which any backend decodes. Codes of the `hash` mapping depend on the
number of a row in its module, which backends count from a first row. So these codes are computed
here, in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import choose_backend, load_backend
from .linear import check_shapes
from .operators import bits_of, no_second_derivative, register, shaped, wide
from .reference.linear import hash_codes_of_rows

_IDS = (torch.int64, torch.int32)


def lut_embedding(
    ids: Tensor,
    index_map: Tensor,
    table: Tensor,
    in_features: int,
    *,
    hash_seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return rows of the dense weight of a sketch.

    The result is differentiable once in the table. Its gradient is summed in float32 or wider, in
    an order that does not change from call to call.

    Args:
        ids: Numbers of rows, int64 or int32 [...].
        index_map: Packed codes, uint8 [out_features, row_bytes]; [out_features, 0] with
            `hash_seed`.
        table: Tables, float [out_features, groups, 2^bits].
        in_features: Columns of the weight.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        backend: `cpu`, `portable`, `reference` or `triton`; by default the fastest one (see
            `dispatch.py`). Codes of the `hash` mapping are looked up in the same way by all of
            them.

    Returns:
        The rows [..., in_features], in the dtype of the table.

    Raises:
        IndexError: On the CPU, if an id is negative or not below `out_features`.
        TypeError: If the ids are not integers of 32 or 64 bits.
        ValueError: If the shapes cannot match or the backend cannot be used.
    """
    if ids.dtype not in _IDS:
        raise TypeError(f"ids must be int64 or int32, found {ids.dtype}")
    check_shapes(in_features, index_map, table, hash_seed)
    rows: Tensor = torch.ops.spallm.lut_embedding(
        ids, index_map, table, in_features, hash_seed, backend
    )
    return rows


def _lut_embedding(
    ids: Tensor,
    index_map: Tensor,
    table: Tensor,
    in_features: int,
    hash_seed: int | None,
    backend: str | None,
) -> Tensor:
    chosen = load_backend(choose_backend(table.device, bits_of(table), backend))
    flat = ids.reshape(-1)
    tables = table.index_select(0, flat)
    if flat.numel() == 0:
        rows = table.new_empty(0, in_features)
    elif hash_seed is None:
        rows = chosen.dequantize(index_map.index_select(0, flat), tables, in_features)
    else:
        codes = _hashed(flat, tables, in_features, hash_seed)
        rows = tables.gather(2, codes).view(-1, in_features)
    return shaped(rows, *ids.shape, in_features)


def _embedding_table_grad(
    y_grad: Tensor,
    ids: Tensor,
    index_map: Tensor,
    table: Tensor,
    hash_seed: int | None,
    backend: str | None,
) -> Tensor:
    chosen = load_backend(choose_backend(table.device, bits_of(table), backend))
    flat, rows = ids.reshape(-1), y_grad.reshape(-1, y_grad.shape[-1])
    if flat.numel() == 0:
        return torch.zeros(table.shape, dtype=wide(y_grad.dtype), device=table.device)
    tables = table.index_select(0, flat)
    if hash_seed is None:
        sums = chosen.table_grad(rows, index_map.index_select(0, flat), tables)
    else:
        codes = _hashed(flat, tables, rows.shape[1], hash_seed)
        grouped = rows.to(wide(y_grad.dtype)).view(codes.shape)
        entries = range(table.shape[2])
        # Not `scatter_add_`: on a GPU it adds in any order.
        sums = torch.stack([grouped.where(codes == e, 0).sum(2) for e in entries], dim=2)
    # The gradient of an ordinary embedding, whose rows are the tables of a row.
    grad = torch.ops.aten.embedding_dense_backward(
        sums.view(len(sums), -1), flat, table.shape[0], -1, False
    )
    return shaped(grad, *table.shape)


def _hashed(flat: Tensor, tables: Tensor, in_features: int, hash_seed: int) -> Tensor:
    """Return the codes of rows, int64 [rows, groups, columns of a group]."""
    codes = hash_codes_of_rows(flat.long(), in_features, bits_of(tables), hash_seed)
    return codes.view(*tables.shape[:2], -1)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, index_map, table, _, ctx.hash_seed, ctx.backend = inputs
    ctx.save_for_backward(ids, index_map, table)


def _lut_embedding_backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor | None, ...]:
    ids, index_map, table = ctx.saved_tensors
    table_grad = None
    if ctx.needs_input_grad[2]:
        table_grad = torch.ops.spallm.embedding_table_grad(
            y_grad, ids, index_map, table, ctx.hash_seed, ctx.backend
        ).to(table.dtype)
    return None, None, table_grad, None, None, None


def _lut_embedding_shape(
    ids: Tensor, index_map: Tensor, table: Tensor, in_features: int, *rest: Any
) -> Tensor:
    return table.new_empty(*ids.shape, in_features)


def _embedding_table_grad_shape(
    y_grad: Tensor, ids: Tensor, index_map: Tensor, table: Tensor, *rest: Any
) -> Tensor:
    return table.new_empty(table.shape, dtype=wide(y_grad.dtype))


register(
    "lut_embedding(Tensor ids, Tensor index_map, Tensor table, int in_features, int? hash_seed, "
    "str? backend) -> Tensor",
    _lut_embedding,
    _lut_embedding_shape,
    _lut_embedding_backward,
    _save_inputs,
)
register(
    "embedding_table_grad(Tensor y_grad, Tensor ids, Tensor index_map, Tensor table, "
    "int? hash_seed, str? backend) -> Tensor",
    _embedding_table_grad,
    _embedding_table_grad_shape,
    no_second_derivative,
)
