"""Compute linear layers of vLLM with sketched weights, under any parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, RowParallelLinear

from .layer import LayerSketch
from .products import dense_weight, multiply


class SketchedLinearMethod(LinearMethodBase):
    """Compute a linear layer, or several that vLLM has joined.

    Args:
        sketch: What is known of the layer.
    """

    def __init__(self, sketch: LayerSketch) -> None:
        self.sketch = sketch

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
        """Register a parameter for labels. If the layer splits its inputs, so does the sketch."""
        rank = layer.tp_rank if isinstance(layer, RowParallelLinear) else 0
        start = rank * input_size_per_partition
        self.sketch.columns = range(start, start + input_size_per_partition)
        self.sketch.dtype = params_dtype
        self.device = torch.empty(0).device  # vLLM builds models on their device
        rows = (sum(output_partition_sizes),)
        self.sketch.expect(layer, rows, extra["weight_loader"], "weight")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Read the rows that the labels name."""
        self.sketch.read(layer, self.device)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the product with the weight, float [..., rows], plus the bias."""
        sets = getattr(layer, "sets_of_tokens", None)
        return multiply(layer, self.sketch.products, x, bias, sets)

    def dequantize_weight(self, layer: nn.Module) -> Tensor:
        """Return the dense weight, [rows, columns]; some attention layers absorb it."""
        return dense_weight(layer, self.sketch.products, len(self.sketch.columns))
