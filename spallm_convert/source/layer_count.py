"""Refuse configs with far more layers than a checkpoint can hold, before a model is built.

Building a model takes time and memory for every layer of its config, even on the meta device. A
damaged or hostile config may ask for millions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spallm_formats import CONFIG_FILE, shown

#: Names of the number of layers in configs of transformers.
_KEYS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "depth",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)
#: Layers that share their weights may be more than the tensors. This many are built in a second.
_ALWAYS_ALLOWED = 1000
#: Configs of parts, such as `text_config`, lie at most this deep.
_DEPTH = 3


def layer_count_problem(config: dict[str, Any], parts: int, what: str = "tensors") -> str | None:
    """Return what is wrong with the numbers of layers in a config, None if nothing is.

    Args:
        config: The parsed `config.json`.
        parts: Number of parts of the checkpoint. Every layer should have at least one.
        what: The parts, for the message.
    """
    most = max(parts, _ALWAYS_ALLOWED)
    for key, value in _numbers(config, _DEPTH):
        if value > most:
            return (
                f"{CONFIG_FILE}: {key} is {shown(value)}, but the checkpoint has only {parts} "
                f"{what}; use the {CONFIG_FILE} that belongs to these weights"
            )
    return None


def _numbers(config: dict[str, Any], depth: int) -> Iterator[tuple[str, int | float]]:
    """Yield the names and values of all numbers of layers."""
    for key, value in config.items():
        if key in _KEYS and isinstance(value, int | float):
            yield key, value
        elif isinstance(value, dict) and depth:
            yield from _numbers(value, depth - 1)
