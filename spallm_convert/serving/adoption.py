"""Sketch the layers that vLLM has built dense because its model did not ask for them.

Most models build embeddings, and some build projectors, without telling a quantization where they
are. When the model stands, every layer has its path, so those that are sketched are found.
"""

from __future__ import annotations

from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from .config import SketchedConfig
from .embedding import SketchedEmbeddingMethod
from .linear import SketchedLinearMethod


def adopt_layers(model: nn.Module, config: SketchedConfig) -> None:
    """Give sketched layers that were built dense parameters for labels.

    Args:
        model: The model, without weights.
        config: The config of the checkpoint.
    """
    for name, layer in model.named_modules():
        kind = type(getattr(layer, "quant_method", None))
        if isinstance(layer, VocabParallelEmbedding) and kind is UnquantizedEmbeddingMethod:
            _adopt_embedding(model, name, layer, config)
        elif isinstance(layer, LinearBase) and kind is UnquantizedLinearMethod:
            sketch = config.adopt(name)
            if sketch is not None:
                del layer.weight
                layer.quant_method = SketchedLinearMethod(sketch)
                _create_weights(layer)


def _adopt_embedding(
    model: nn.Module, name: str, layer: VocabParallelEmbedding, config: SketchedConfig
) -> None:
    sketch = config.adopt(name)
    if sketch is None:
        return
    dense = layer.weight
    tied = [
        other
        for other in model.modules()
        if isinstance(other, VocabParallelEmbedding) and other.weight is dense
    ]
    del layer.weight
    layer.quant_method = SketchedEmbeddingMethod(sketch)
    _create_weights(layer)
    for other in tied:  # vLLM knows by the parameter that both are one weight
        other.weight = layer.weight
        other.quant_method = layer.quant_method
        other.use_fused_embedding = False


def _create_weights(layer: LinearBase | VocabParallelEmbedding) -> None:
    layer.quant_method.create_weights(
        layer,
        getattr(layer, "input_size_per_partition", layer.input_size),
        layer.output_partition_sizes,
        layer.input_size,
        layer.output_size,
        params_dtype=layer.params_dtype,
        weight_loader=layer.weight_loader,
    )
