"""Make tiny random models of many architectures, as transformers saves them."""

from pathlib import Path
from typing import Any

import torch

from .audio import AUDIO
from .encoders import ENCODERS
from .experts import EXPERTS
from .inputs import tiny_inputs as tiny_inputs
from .multimodal import MULTIMODAL
from .states import STATES
from .text import TEXT
from .vision import VISION

#: Kind of each group of architectures, as the table of documented models names it.
KINDS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "text": TEXT,
    "experts": EXPERTS,
    "state space": STATES,
    "encoder": ENCODERS,
    "vision": VISION,
    "vision-language": MULTIMODAL,
    "audio": AUDIO,
}
#: Name of the config class and its options, by model class.
ARCHITECTURES = {name: entry for group in KINDS.values() for name, entry in group.items()}


def available(name: str) -> bool:
    """Return whether the installed transformers has a model class and its config."""
    import transformers

    return hasattr(transformers, name) and hasattr(transformers, ARCHITECTURES[name][0])


def kind_of(name: str) -> str:
    """Return the kind of a class of `ARCHITECTURES`."""
    return next(kind for kind, group in KINDS.items() if name in group)


def build_tiny(name: str, **changes: Any) -> Any:
    """Return a random model of a class of `ARCHITECTURES`, in float32 and in evaluation mode.

    Options of its config may be changed.

    Every matrix is random on the scale of 1 / sqrt(columns), so that each one matters for the
    output. transformers initializes some with zeros, and leaves others as the memory was. It sets
    the embedding of the padding to zeros whenever it loads a model.
    """
    import transformers

    config_name, options = ARCHITECTURES[name]
    torch.manual_seed(0)
    # Configs keep and change the dicts that they are given.
    config = getattr(transformers, config_name)(**_copied(options | changes))
    model = getattr(transformers, name)(config).float().eval()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue  # fixed positions
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif not parameter.isfinite().all() or not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight.data[module.padding_idx] = 0
    return model


def save_tiny(name: str, folder: Path, **changes: Any) -> Path:
    """Save a random model of a class of `ARCHITECTURES`, under the names of the Hub.

    Args:
        name: The model class.
        folder: Where to save it.
        changes: Options of its config in place of those of `ARCHITECTURES`.

    Returns:
        The folder.
    """
    build_tiny(name, **changes).save_pretrained(folder)
    return folder


def _copied(options: Any) -> Any:
    if isinstance(options, dict):
        return {key: _copied(value) for key, value in options.items()}
    return list(options) if isinstance(options, list) else options
