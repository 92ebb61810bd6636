"""Build the module tree of a model without its weights, to find the linear layers.

transformers builds the tree on the meta device from `config.json`. `load_sketched` replaces the
linear layers of the same tree by sketched ones, so the tree decides what is sketched. Names and
shapes of tensors would not be enough: embeddings are two-dimensional too, and GPT-2's projections
are transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spallm_convert.errors import SourceError, one_line

from .linear_weights import LinearWeight
from .linears import find_linears
from .parsed_config import parsed_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spallm_formats import StoredTensor


@dataclass(frozen=True)
class Skeleton:
    """Describe the linear layers of a model.

    Attributes:
        weights: The weights of linear layers and experts inside numbered blocks, by path of the
            parameter.
        unfit: The reason for each of these weights that cannot be sketched, by path of the
            parameter.
        model: The model, on the meta device.
    """

    weights: dict[str, LinearWeight]
    unfit: dict[str, str]
    model: PreTrainedModel


def by_model_name(
    model: PreTrainedModel, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint by their names in the model.

    transformers renames some tensors while loading: GPT-NeoX's head is stored as "embed_out.weight"
    and called "lm_head.weight". Tensors that are fused, split or transposed while loading are left
    out, because no parameter of the model has their values.

    Args:
        model: The model, whose weights may be on the meta device.
        tensors: Tensors by their names in the checkpoint.

    Returns:
        Tensors by their names in the model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    own = model.state_dict()
    found = {}
    for name, tensor in tensors.items():
        new, converter = rename_source_key(
            name, renamings, converters, model.base_model_prefix, own
        )
        if new not in own:  # then transformers only adds or removes the base prefix
            new, converter = rename_source_key(name, [], [], model.base_model_prefix, own)
        if converter is None:
            found[new] = tensor
    return found


def read_skeleton(
    folder: Path, config: dict[str, Any], *, trust_remote_code: bool = False
) -> Skeleton:
    """Build the model of a folder's config on the meta device, and list its linear layers.

    Args:
        folder: Folder of the model.
        config: Its parsed `config.json`.
        trust_remote_code: Whether Python code in the folder may be run.

    Returns:
        The skeleton.

    Raises:
        SourceError: If transformers does not know the architecture or cannot build the model, or if
            the architecture is code in the folder and `trust_remote_code` is False.
    """
    import torch

    model_class = find_model_class(folder, config, trust_remote_code)
    with torch.device("meta"):
        model = _build(model_class, folder, config, trust_remote_code)
    return Skeleton(*find_linears(model), model)


def numbers_starred(name: str) -> str:
    """Replace each number in a path by a star, so that a layer has the same name in every block."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def find_model_class(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> Any:
    """Return the model class that a config names.

    Args:
        folder: Folder of the model.
        config: Its parsed `config.json`.
        trust_remote_code: Whether Python code in the folder may be run.

    Raises:
        SourceError: If transformers does not know the architecture, or if the architecture is code
            in the folder and `trust_remote_code` is False.
    """
    import transformers

    architecture = config["architectures"][0]
    known = getattr(transformers, architecture, None)
    # transformers puts a stand-in, which is no model, in place of a class that needs a package.
    is_stand_in = hasattr(known, "_backends")
    if isinstance(known, type) and (issubclass(known, transformers.PreTrainedModel) or is_stand_in):
        return known
    remote = remote_class(config.get("auto_map"), architecture)
    if remote is None:
        raise SourceError(
            f"transformers {transformers.__version__} does not know the architecture "
            f"{architecture!r}; a newer version may: pip install --upgrade transformers"
        )
    if not trust_remote_code:
        raise SourceError(
            f"the architecture {architecture!r} is code in the model's repository: read it, then "
            f"allow it with --trust-remote-code"
        )
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(remote[1], str(folder))


def remote_class(auto_map: dict[str, Any] | None, architecture: str) -> tuple[str, str] | None:
    """Find an architecture in the Python code of a model's repository.

    Args:
        auto_map: `auto_map` of the model's config.
        architecture: Name of the model class.

    Returns:
        The Auto class that loads it, and its reference ("FILE.CLASS"). None if it is not there.
    """
    references = (
        auto_map.items() if isinstance(auto_map, dict) else []
    )  # values are names, or lists of names and null
    named = [(auto, name) for auto, name in references if isinstance(name, str)]
    return next((pair for pair in named if pair[1].endswith("." + architecture)), None)


def build_empty(
    folder: Path, config: dict[str, Any], *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the model of a folder's config with real buffers and parameters on the meta device.

    Args:
        folder: Folder of the model.
        config: Its parsed `config.json`.
        trust_remote_code: Whether Python code in the folder may be run.

    Returns:
        The model.

    Raises:
        SourceError: As in `read_skeleton`.
    """
    from accelerate import init_empty_weights

    model_class = find_model_class(folder, config, trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = _build(model_class, folder, config, trust_remote_code)
        return model


def _build(model_class: Any, folder: Path, config: dict[str, Any], trust_remote_code: bool) -> Any:
    import torch

    try:
        parsed = parsed_config(folder, trust_remote_code=trust_remote_code)
        with torch.random.fork_rng(devices=[]):  # DiffLlama draws random numbers when built
            return model_class(parsed)
    except Exception as error:  # a model's code may raise anything for a bad config
        reason = one_line(error)
        raise SourceError(
            f"transformers cannot build {config['architectures'][0]} from {folder / 'config.json'}"
            f": {reason}"
        ) from error
