"""Define `SketchedLinear`, a linear layer whose weight is an index map and trainable tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spallm_formats import SketchedModule, row_bytes

from .sketch import Sketch, Sketched, Span, table_path, tables_in_use


class SketchedLinear(Sketched, nn.Linear):
    """Compute y = x W^T + bias with W[o, i] = weight_table[o, i // (in / groups), code[o, i]].

    The class is a subclass of nn.Linear, so code that looks for linear layers finds it. The index
    map is a parameter and not a buffer, so that sharding finds it. The constructor leaves the index
    map and the tables uninitialized: loading a checkpoint fills them.

    Args:
        shape: Shape of the weight, bits per code, and groups per row.
        bias: The bias, float [out_features], or None.
        table_dtype: Dtype of the tables.
        hash_seed: Seed of the mapping `hash`, whose codes are computed. None: codes are stored.
        device: Device of the parameters. None: torch's default device.
        spans: The stored rows that the layer consists of. Empty: it is stored under its path in
            the model.

    Attributes:
        weight: The index map, packed codes, uint8 [out_features, row_bytes], frozen. With
            `hash_seed`: uint8 [out_features, 0].
        weight_table: The tables, float [out_features, groups_per_row, 2^bits], trainable.
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        bits: Bits per code: 2, 3 or 4.
        groups_per_row: Tables per row.
    """

    weight_table: nn.Parameter

    def __init__(
        self,
        shape: SketchedModule,
        *,
        bias: nn.Parameter | None,
        table_dtype: torch.dtype,
        hash_seed: int | None = None,
        device: torch.device | str | None = None,
        spans: tuple[Span, ...] = (),
    ) -> None:
        nn.Module.__init__(self)
        self.shape = shape
        self.sketches = {"weight": Sketch(shape, spans, hash_seed)}
        self.in_features = shape.in_features
        self.out_features = shape.out_features
        self.bits = shape.bits
        self.groups_per_row = shape.groups_per_row
        self.hash_seed = hash_seed
        packed = 0 if hash_seed is not None else row_bytes(shape.in_features, shape.bits)
        self.weight = nn.Parameter(
            torch.empty(shape.out_features, packed, dtype=torch.uint8, device=device),
            requires_grad=False,
        )
        self.weight_table = nn.Parameter(
            torch.empty(shape.table_shape, dtype=table_dtype, device=device)
        )
        self.register_parameter("bias", bias)
        # Without this, transformers fills parameters that are offloaded to disk with random bytes.
        self._is_hf_initialized = True

    def reset_parameters(self) -> None:
        """Do nothing: a sketch comes from a checkpoint and has no random initial state."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the product with the sketched weight, plus the bias.

        The result is differentiable in the input, the tables and the bias.

        Args:
            input: Inputs, float [..., in_features].

        Returns:
            Outputs, float [..., out_features], in the dtype of the input, or in autocast's dtype.

        Raises:
            ValueError: If the last dimension of the input is not `in_features`.
        """
        if input.shape[-1] != self.in_features:  # the packed codes do not determine their number
            raise ValueError(
                f"the last dimension of the input must be {self.in_features}, found the shape "
                f"{list(input.shape)}"
            )
        sketch = self.sketches["weight"]
        return sketch.product(input, self.weight, tables_in_use(self, "weight"), self.bias)

    def dense_weight(self) -> Tensor:
        """Return the dense weight, [out_features, in_features], in the dtype of the tables."""
        return self.sketches["weight"].dense_weight(self.weight, tables_in_use(self, "weight"))

    def extra_repr(self) -> str:
        mapping = "cluster" if self.hash_seed is None else "hash"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"groups_per_row={self.groups_per_row}, mapping={mapping}, bias={self.bias is not None}"
        )


def train_tables_only(model: nn.Module) -> None:
    """Make the sketch tables trainable and freeze everything else."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Sketched):
            for path in module.sketches:
                module.get_parameter(table_path(path)).requires_grad_(True)
