"""Tell vLLM which of its layers are sketched: `quant_method: "spallm"` in `config.json`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from spallm_formats import INDEX_MAP_SUFFIX, QUANT_METHOD, SketchMetadata

from .experts import SketchedExpertsMethod, expert_weights
from .labels import StoredWeights
from .layer import LayerSketch
from .linear import SketchedLinearMethod


class SketchedConfig(QuantizationConfig):
    """Hold the `quantization_config` of a sketched checkpoint for vLLM.

    Attributes:
        metadata: The parsed config.
        layers: What is known of the layers that compute with sketches, filled while vLLM builds
            the model.
        stored: The weights of the checkpoint; set when loading begins.
    """

    def __init__(self, metadata: SketchMetadata) -> None:
        super().__init__()
        self.metadata = metadata
        self.layers: list[LayerSketch] = []
        self.stored: StoredWeights | None = None
        #: Names of stored weights by the names that vLLM has for them.
        self._weights = {
            weight: weight
            for name, module in metadata.modules.items()
            for weight in [module.index_map_name(name)]
        }

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SketchedConfig:
        return cls(SketchMetadata.from_json(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename weights as vLLM does. vLLM may call this several times."""
        self._weights = hf_to_vllm_mapper.apply_dict(self._weights)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how to compute a layer; vLLM's own way if it is not sketched."""
        if isinstance(layer, LinearBase):
            weights = self._linear_weights(prefix)
            if not weights:
                return UnquantizedLinearMethod()
            return SketchedLinearMethod(self._add(prefix, weights))
        if isinstance(layer, RoutedExperts):
            weights = expert_weights(layer, prefix, self._weights, self.metadata)
            if not weights:
                return None
            return SketchedExpertsMethod(layer.moe_config, self._add(prefix, weights))
        return None  # embeddings: see `adoption.py`

    def adopt(self, name: str) -> LayerSketch | None:
        """Return the sketch of a layer that vLLM has built without asking.

        Args:
            name: Path of the layer in the model.

        Returns:
            The sketch. None: the layer is not sketched.
        """
        weights = self._linear_weights(name)
        return self._add(name, weights) if weights else None

    def stored_below(self, prefixes: Iterable[str]) -> set[str]:
        """Return the names of the stored weights of modules below vLLM's modules."""
        below = tuple(f"{prefix}." for prefix in prefixes)
        return {stored for name, stored in self._weights.items() if name.startswith(below)}

    def _linear_weights(self, prefix: str) -> list[str]:
        """Return the stored weights of a linear layer; none if no part of it is sketched.

        Parts that were left dense are among them. They lie beside the sketched ones.
        """
        stored = self._weights.get(prefix + INDEX_MAP_SUFFIX)
        if stored is not None:
            return [stored]
        parent, _, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name, [])
        found = [self._weights.get(f"{parent}.{part}{INDEX_MAP_SUFFIX}") for part in parts]
        known = next((weight for weight in found if weight is not None), None)
        if known is None:
            return []
        beside = known.removesuffix(INDEX_MAP_SUFFIX).rpartition(".")[0]
        return [
            weight or f"{beside}.{part}{INDEX_MAP_SUFFIX}"
            for weight, part in zip(found, parts, strict=True)
        ]

    def _add(self, prefix: str, weights: list[str]) -> LayerSketch:
        sketch = LayerSketch(prefix, weights)
        self.layers.append(sketch)
        return sketch
