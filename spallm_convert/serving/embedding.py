"""Look up sketched embeddings in vLLM, and compute sketched heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from spallm_kernels import dequantize, lut_embedding

from .layer import LayerSketch
from .products import multiply


class SketchedEmbeddingMethod(QuantizeMethodBase):
    """Compute a sketched embedding or head, or both if they are tied.

    Args:
        sketch: What is known of the layer.
    """

    def __init__(self, sketch: LayerSketch) -> None:
        self.sketch = sketch
        self.owner: Any = None

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register a parameter for labels."""
        self.sketch.columns = range(input_size)
        self.sketch.dtype = params_dtype
        self.device = torch.empty(0).device
        rows = (sum(output_partition_sizes),)
        self.sketch.expect(layer, rows, extra["weight_loader"], "weight")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Read the rows that the labels name. A tied head shares those of its embedding."""
        if self.owner is None:
            self.owner = layer
            self.sketch.read(layer, self.device, is_padded=True)
        elif layer is not self.owner:
            del layer.weight

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return logits, float [tokens, rows]."""
        sets = getattr(self.owner, "sets_of_samples", None)
        return multiply(self.owner, self.sketch.products, x, bias, sets)

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Return the rows of ids, [..., columns]."""
        owner, (product,) = self.owner, self.sketch.products
        assert product.table is not None
        codes, table = getattr(owner, product.weight), getattr(owner, product.table)
        columns = len(self.sketch.columns)
        if product.slots is None:
            return lut_embedding(input_, codes, table, columns)
        ids = input_.flatten()
        sets = owner.sets_of_tokens[: len(ids)]
        tuned = getattr(owner, product.slots)[sets.clamp(min=0), ids]
        tables = torch.where((sets >= 0).view(-1, 1, 1), tuned, table[ids])
        rows = dequantize(codes[ids], tables, columns)
        return rows.view(*input_.shape, columns)
