"""Make the headers of a checkpoint that does not exist, with the names and shapes of the Hub's.

transformers builds the model on the meta device, and its own conversion tables give the names and
shapes under which the model is saved. No weight is stored, so a model of any size can be planned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spallm_convert.source.checkpoint import DenseCheckpoint, open_dense
from spallm_formats import StoredTensor

from .models import Published

_FILE = "model.safetensors"
#: What blocks that predict further tokens have besides the tensors of a usual block, by the
#: dimensions: h is the hidden size, v the vocabulary.
_FURTHER = {
    "embed_tokens.weight": "vh",
    "enorm.weight": "h",
    "hnorm.weight": "h",
    "eh_proj.weight": "hH",
    "shared_head.norm.weight": "h",
    "shared_head.head.weight": "vh",
}


def made_up(published: Published, folder: Path) -> DenseCheckpoint:
    """Write the config of a model, and return a checkpoint with its headers.

    Args:
        published: The model.
        folder: A folder, where `config.json` is written.
    """
    import transformers

    config_class = getattr(transformers, published.config)
    config = config_class(**published.options)
    config.architectures = [published.architecture]
    config.save_pretrained(folder)
    shapes = hub_shapes(published.architecture, config)
    for number in range(published.more_blocks):
        shapes |= _further(published, config, config.num_hidden_layers + number)
    tensors, offset = {}, 0
    for name, shape in shapes.items():
        tensors[name] = StoredTensor(name, "BF16", shape, folder / _FILE, offset)
        offset += tensors[name].nbytes
    return open_dense(folder, tensors)


def hub_shapes(architecture: str, config: Any) -> dict[str, tuple[int, ...]]:
    """Return the tensors that transformers saves for a model: names and shapes.

    Args:
        architecture: Name of the model class.
        config: The config.
    """
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    tied = getattr(model, "all_tied_weights_keys", {})
    state: dict[str, Tensor] = {n: t for n, t in model.state_dict().items() if n not in tied}
    saved: Mapping[str, Tensor] = revert_weight_conversion(model, state)
    return {name: tuple(tensor.shape) for name, tensor in saved.items()}


def _further(published: Published, config: Any, block: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a block after the last one, which predicts further tokens."""
    longer = json.loads(config.to_json_string()) | {"num_hidden_layers": block + 1}
    shapes = hub_shapes(published.architecture, type(config)(**longer))
    start = f"model.layers.{block}."
    sizes = {"h": config.hidden_size, "H": 2 * config.hidden_size, "v": config.vocab_size}
    return {name: shape for name, shape in shapes.items() if name.startswith(start)} | {
        start + name: tuple(sizes[size] for size in dimensions)
        for name, dimensions in _FURTHER.items()
    }
