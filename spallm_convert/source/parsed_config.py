"""Parse the config of a model with transformers, without a description of quantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .quantized.methods import DESCRIPTION_KEYS


def parsed_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the config of a folder as a dense model has it.

    With a description of quantized weights, transformers would make a model with quantized layers.

    Args:
        folder: Folder of the model.
        trust_remote_code: Whether Python code in the folder may be run.

    Returns:
        A config of transformers.

    Raises:
        Exception: Any error of transformers, or of the model's code.
    """
    from transformers import AutoConfig, PreTrainedConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    parts = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]
    for part in (config, *parts):
        for key in DESCRIPTION_KEYS:
            vars(part).pop(key, None)
    return config
