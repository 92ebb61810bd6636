"""Describe the two parameters of a sketch in memory, and the stored modules that they consist of.

A parameter may hold one stored module, several (the experts of a block, which are often stored one
by one), or a part of one (transformers splits some projections). Everything that a user sees keeps
the names of the stored modules: `Span` connects both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spallm_formats import SCALE_ENDING, SHIFT_ENDING, TABLE_ENDING, SketchedModule, pack
from spallm_kernels.embedding import lut_embedding
from spallm_kernels.linear import dequantize, lut_linear


class Span(NamedTuple):
    """Describe consecutive rows of a stored module.

    Attributes:
        name: Name of the module in the checkpoint.
        module: The whole module.
        first: Number of the first row. Rows of fused experts are counted through.
        rows: Number of rows.
    """

    name: str
    module: SketchedModule
    first: int
    rows: int

    @classmethod
    def whole(cls, name: str, module: SketchedModule) -> Span:
        """Return the span of all rows of a module."""
        return cls(name, module, 0, module.rows)

    @property
    def is_whole(self) -> bool:
        """Return whether these are all rows of the module."""
        return self.rows == self.module.rows


@dataclass(frozen=True)
class Sketch:
    """Describe an index map and its tables.

    Attributes:
        shape: Shape of the weight that they stand for. `transposed` says whether the model's own
            parameter has a row per input.
        spans: The stored rows, in order. Empty: the layer was made by hand, so it is stored under
            its path in the model.
        hash_seed: Seed of the mapping `hash`, whose codes are computed. None: codes are stored.
        numbers_rows_through: Whether the rows of all experts can be numbered from zero: codes are
            stored, or hashed by these numbers.
    """

    shape: SketchedModule
    spans: tuple[Span, ...] = ()
    hash_seed: int | None = None
    _is_numbered_from_zero: bool = field(init=False)  # rows have their numbers in a stored module
    numbers_rows_through: bool = field(init=False)

    def __post_init__(self) -> None:
        first = self.spans[0].first if self.spans else 0
        single = len(self.spans) <= 1 and self.shape.experts in (None, 1)
        # Not a property: torch.compile does not know how to evaluate it.
        object.__setattr__(self, "_is_numbered_from_zero", single and first == 0)
        through = self.hash_seed is None or (len(self.spans) == 1 and first == 0)
        object.__setattr__(self, "numbers_rows_through", through)

    def product(
        self,
        x: Tensor,
        index_map: Tensor,
        table: Tensor,
        bias: Tensor | None = None,
        *,
        expert: int = 0,
    ) -> Tensor:
        """Return the product with the weight, or with the weight of one expert, plus a bias.

        Args:
            x: Inputs, float [..., in_features].
            index_map: Packed codes, uint8 [out_features, row_bytes], in any dtype that holds bytes.
            table: Tables, float [out_features, groups_per_row, 2^bits].
            bias: Float [out_features], or None.
            expert: Number of the expert.
        """
        if index_map.dtype != torch.uint8:
            # FSDP2 of torch 2.9 casts every tensor that it gathers. Floats represent bytes exactly.
            index_map = index_map.to(torch.uint8)
        if self.hash_seed is None or self._is_numbered_from_zero:
            return lut_linear(x, index_map, table, bias, hash_seed=self.hash_seed)
        parts = [
            lut_linear(x, packed, table[rows], hash_seed=seed)
            for rows, packed, seed in self._numbered(index_map, expert)
        ]
        y = torch.cat(parts, dim=-1)
        return y if bias is None else y + bias.to(y.dtype)

    def dense_weight(self, index_map: Tensor, table: Tensor, *, expert: int = 0) -> Tensor:
        """Return the dense weight of a layer or of one expert, [out_features, in_features].

        Args:
            index_map: As for `product`.
            table: As for `product`.
            expert: Number of the expert.
        """
        columns = self.shape.in_features
        if self.hash_seed is None or self._is_numbered_from_zero:
            return dequantize(index_map, table, columns, hash_seed=self.hash_seed)
        parts = [
            dequantize(packed, table[rows], columns, hash_seed=seed)
            for rows, packed, seed in self._numbered(index_map, expert)
        ]
        return torch.cat(parts)

    def rows(self, ids: Tensor, index_map: Tensor, table: Tensor) -> Tensor:
        """Return rows of the weight, [..., in_features], in the dtype of the tables.

        Args:
            ids: Numbers of rows, int64 or int32 [...].
            index_map: As for `product`.
            table: As for `product`.
        """
        if index_map.dtype != torch.uint8:
            index_map = index_map.to(torch.uint8)
        return lut_embedding(
            ids, index_map, table, self.shape.in_features, hash_seed=self.hash_seed
        )

    # Codes computed by NumPy are not for torch.compile.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _numbered(self, index_map: Tensor, expert: int) -> list[tuple[slice, Tensor, int | None]]:
        """Return parts of a weight with computed codes: rows, index map, and seed.

        Hashes depend on the number of a row in its stored module. The product numbers rows from
        zero, so codes of rows that begin elsewhere are computed here.
        """
        from spallm_kernels import hash_codes  # imports numba

        assert self.hash_seed is not None
        height, columns, bits = self.shape.out_features, self.shape.in_features, self.shape.bits
        found: list[tuple[slice, Tensor, int | None]] = []
        start = -expert * height  # number of a span's first row in this weight
        for span in self.spans:
            low, high = max(0, start), min(height, start + span.rows)
            if low < high:
                rows, first = slice(low, high), span.first + low - start
                if first == 0:
                    found.append((rows, index_map[rows], self.hash_seed))
                else:
                    codes = hash_codes(high - low, columns, bits, self.hash_seed, first)
                    packed = torch.from_numpy(np.ascontiguousarray(pack(codes, bits)))
                    found.append((rows, packed.to(index_map.device), None))
            start += span.rows
        return found


class Sketched:
    """Mark a module that holds sketches.

    Attributes:
        sketches: Its sketches, by path of the index map in the module. The tables have the same
            path with "_table" at the end.
        is_tied: Whether another module owns the parameters and gives them their stored name.
    """

    sketches: dict[str, Sketch]
    is_tied = False


def table_path(index_map: str) -> str:
    """Return the path of the tables that belong to an index map."""
    return index_map + TABLE_ENDING


def affine_paths(index_map: str) -> tuple[str, str]:
    """Return the paths of the shifts and scales of the tables that belong to an index map."""
    return index_map + SHIFT_ENDING, index_map + SCALE_ENDING


def tables_in_use(module: nn.Module, index_map: str) -> Tensor:
    """Return the tables that a module computes with: shift + scale * table if it is affine.

    The result is differentiable in the tables, the shifts and the scales.

    Args:
        module: The module that has the index map.
        index_map: Name of the index map in the module.
    """
    table: Tensor = getattr(module, table_path(index_map))
    shift_path, scale_path = affine_paths(index_map)
    shift: Tensor | None = getattr(module, shift_path, None)
    if shift is None:
        return table
    return apply_affine(table, shift, getattr(module, scale_path))


def apply_affine(table: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return shift + scale * table, given a shift and a scale for each table."""
    return torch.addcmul(shift.unsqueeze(-1), scale.unsqueeze(-1), table)


def is_sketched(module: Any) -> bool:
    """Return whether a module holds sketches."""
    return isinstance(module, Sketched)
