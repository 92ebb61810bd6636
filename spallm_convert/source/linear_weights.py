"""The record of a parameter that a model multiplies with, as with the weight of a linear layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearWeight:
    """Describe a parameter that is the weight of a linear layer, or the weights of experts.

    Attributes:
        out_features: Size of the outputs.
        in_features: Size of the inputs.
        experts: Number of experts whose weights the parameter holds; None for one layer.
        transposed: Whether the parameter, or the part of each expert, has a row per input.
    """

    out_features: int
    in_features: int
    experts: int | None = None
    transposed: bool = False

    @classmethod
    def of_experts(cls, shape: tuple[int, ...], *, transposed: bool) -> LinearWeight:
        """Return the record for a parameter of this shape, (experts, rows, columns)."""
        experts, rows, columns = shape
        sizes = (columns, rows) if transposed else (rows, columns)
        return cls(*sizes, experts=experts, transposed=transposed)

    @property
    def rows(self) -> int:
        """Return the number of rows of a sketch, those of all experts together."""
        return self.out_features * (1 if self.experts is None else self.experts)
