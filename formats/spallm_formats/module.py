"""Describe a sketched module: its shape, and the names and shapes of its stored tensors.

A module is one weight of the source: that of a linear layer or an embedding, or the weights of all
experts that the source keeps in one tensor.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .dtypes import TABLE_DTYPES
from .header import TensorSpec
from .packing import row_bytes

INDEX_MAP_SUFFIX = ".weight"
TABLE_ENDING = "_table"
TABLE_SUFFIX = INDEX_MAP_SUFFIX + TABLE_ENDING
#: Endings of the two numbers that an affine set has for each table.
SHIFT_ENDING = "_shift"
SCALE_ENDING = "_scale"


@dataclass(frozen=True, kw_only=True)
class SketchedModule:
    """Hold the shape of a sketched layer or expert, or of all experts in one fused tensor.

    Attributes:
        in_features: Columns of the weight.
        out_features: Rows of the weight, or of each expert's.
        bits: Bits of a code, 1 to 8.
        groups_per_row: Tables per row; divides in_features.
        experts: Number of experts whose weights are fused in one tensor. None: the module is a
            layer, or an expert that is stored apart.
        transposed: Whether the source stores the weight, or each expert's, with a row per input.
    """

    in_features: int
    out_features: int
    bits: int
    groups_per_row: int
    experts: int | None = None
    transposed: bool = False

    @property
    def rows(self) -> int:
        """Return the number of rows, those of all experts together."""
        return self.out_features * (1 if self.experts is None else self.experts)

    @property
    def entries(self) -> int:
        """Return the entries of one sketch table, which serves one group of one row."""
        return 1 << self.bits

    @property
    def weights(self) -> int:
        """Return the number of weights."""
        return self.in_features * self.rows

    @property
    def table_shape(self) -> tuple[int, ...]:
        """Return the shape of the tables, (out_features, groups_per_row, entries).

        The number of experts stands before it if there are any.
        """
        return *self._leading, self.out_features, self.groups_per_row, self.entries

    @property
    def affine_shape(self) -> tuple[int, ...]:
        """Return the shape of the shifts, and of the scales: one number for each table."""
        return self.table_shape[:-1]

    @property
    def _leading(self) -> tuple[int, ...]:
        return () if self.experts is None else (self.experts,)

    def index_map_name(self, name: str) -> str:
        """Return the name of the module's index map, given the name of the module.

        A layer's weight is a tensor of its module. Fused experts are a tensor, whose own name is
        that of the module.
        """
        return name + INDEX_MAP_SUFFIX if self.experts is None else name

    def table_name(self, name: str) -> str:
        """Return the name of the module's tables, given the name of the module."""
        return self.index_map_name(name) + TABLE_ENDING

    def affine_names(self, name: str) -> tuple[str, str]:
        """Return the names of the shifts and the scales, given the name of the module."""
        return (
            self.index_map_name(name) + SHIFT_ENDING,
            self.index_map_name(name) + SCALE_ENDING,
        )

    def stored_bits_per_weight(self, mapping: str, table_dtype: str) -> float:
        """Return the bits on disk per weight of this module: index map with padding, plus tables.

        Args:
            mapping: "cluster" or "hash".
            table_dtype: "bfloat16", "float16" or "float32".
        """
        specs = self.tensors("module", mapping, table_dtype)
        return 8 * sum(spec.nbytes for spec in specs) / self.weights

    def tensors(self, name: str, mapping: str, table_dtype: str) -> tuple[TensorSpec, TensorSpec]:
        """Return the index map and the table of this module as they are stored.

        Args:
            name: Name of the module.
            mapping: "cluster" or "hash".
            table_dtype: "bfloat16", "float16" or "float32".
        """
        packed = row_bytes(self.in_features, self.bits) if mapping == "cluster" else 0
        shape = (*self._leading, self.out_features, packed)
        return (
            TensorSpec(self.index_map_name(name), "U8", shape),
            TensorSpec(self.table_name(name), TABLE_DTYPES[table_dtype], self.table_shape),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the module's object in `quantization_config`."""
        document = asdict(self)
        if self.experts is None:
            del document["experts"]
        if not self.transposed:
            del document["transposed"]
        return document
