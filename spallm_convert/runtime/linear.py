"""`SketchedLinear`: a linear layer whose weight is an index map and trainable sketch tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spallm_formats import SketchedModule, row_bytes
from spallm_kernels.linear import dequantize, lut_linear


class SketchedLinear(nn.Linear):
    """y = x W^T + bias with W[o, i] = weight_table[o, i // (in / groups), code[o, i]].

    weight: uint8 [out_features, row_bytes], the packed codes, frozen ([out_features, 0] with
    `hash_seed`, from which the codes are computed then). weight_table: float [out_features, groups,
    2^bits], trainable. stored_name: what the module is called on disk. A subclass of nn.Linear, so
    that what looks for linear layers finds it; parameters and not buffers, so that sharding finds
    the index map.
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
        stored_name: str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.shape = shape
        self.stored_name = stored_name
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
        # transformers initializes what it has offloaded to disk, and would draw random bytes.
        self._is_hf_initialized = True

    def reset_parameters(self) -> None:
        """Nothing: a sketch comes from a checkpoint, there is no random one to begin with."""

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-1] != self.in_features:  # packed codes do not tell how many there are
            raise ValueError(
                f"the layer takes {self.in_features} features, found an input {list(input.shape)}"
            )
        index_map: Tensor = self.weight
        if index_map.dtype != torch.uint8:
            # FSDP2 of torch 2.9 casts all that it gathers. Floats hold bytes exactly.
            index_map = index_map.to(torch.uint8)
        return lut_linear(input, index_map, self.weight_table, self.bias, hash_seed=self.hash_seed)

    def dense_weight(self) -> Tensor:
        """The dense weight, [out_features, in_features] in the dtype of the tables."""
        return dequantize(
            self.weight, self.weight_table, self.in_features, hash_seed=self.hash_seed
        )

    def extra_repr(self) -> str:
        mapping = "cluster" if self.hash_seed is None else "hash"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"groups_per_row={self.groups_per_row}, mapping={mapping}, bias={self.bias is not None}"
        )


def train_tables_only(model: nn.Module) -> None:
    """Makes the sketch tables trainable and freezes all else."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, SketchedLinear):
            module.weight_table.requires_grad_(True)
