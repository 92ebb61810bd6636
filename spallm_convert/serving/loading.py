"""Put a sketched checkpoint in the way of vLLM's loader."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import PPMissingLayer

from spallm_formats import QUANT_METHOD, SketchedCheckpoint

from .adoption import adopt_layers
from .config import SketchedConfig
from .labels import StoredWeights
from .stream import WeightStream

logger = init_logger("vllm.spallm_convert")


def install() -> None:
    """Let sketched models be loaded by labels. Other models are loaded as before."""
    stock = DefaultModelLoader.get_all_weights
    if getattr(stock, "serves_sketches", False):
        return

    @functools.wraps(stock)
    def get_all_weights(
        self: DefaultModelLoader, model_config: Any, model: nn.Module
    ) -> Iterator[tuple[str, Tensor]]:
        tensors = stock(self, model_config, model)
        if model_config.quantization != QUANT_METHOD:
            return tensors
        folder, *_ = self._prepare_weights(
            model_config.model, None, model_config.revision, False, None
        )
        return sketched_weights(Path(folder), model_config.dtype, model, tensors)

    get_all_weights.serves_sketches = True  # type: ignore[attr-defined]
    DefaultModelLoader.get_all_weights = get_all_weights


def sketched_weights(
    folder: Path, dtype: Any, model: nn.Module, tensors: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a sketched checkpoint for the layers of a model.

    Args:
        folder: Folder of the checkpoint.
        dtype: Dtype of the model.
        model: The model, without weights.
        tensors: Names and tensors of the checkpoint.
    """
    config = get_current_vllm_config().quant_config
    assert isinstance(config, SketchedConfig)
    adopt_layers(model, config)
    checkpoint = SketchedCheckpoint.open(folder)
    labelled = {weight for layer in config.layers for weight in layer.weights}
    dense = labelled - {m.index_map_name(name) for name, m in checkpoint.metadata.modules.items()}
    elsewhere = config.stored_below(
        [name for name, module in model.named_modules() if isinstance(module, PPMissingLayer)]
    )
    config.stored = StoredWeights(checkpoint, dense & checkpoint.tensors.keys(), elsewhere)
    for layer in config.layers:
        layer.stored = config.stored
    stream = WeightStream(config.stored, labelled, dtype)
    yield from stream.weights(tensors)
    if stream.dense:
        logger.warning(
            "%d sketched modules are served dense, because %s has no layers of their kind that can "
            "be sketched: %s",
            len(stream.dense),
            type(model).__name__,
            ", ".join(stream.dense[:3]) + (", ..." if len(stream.dense) > 3 else ""),
        )
