"""The module tree of a model, without its weights: which tensors are weights of linear layers.

The tree is built by transformers on the meta device from `config.json` alone. It decides what is
sketched, because `load_sketched` puts sketched layers where this very tree has linear ones: a
guess from tensor names would differ somewhere (embeddings are two-dimensional too, GPT-2's
projections are transposed, MoE experts are fused).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spallm_convert.errors import SourceError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spallm_formats import StoredTensor

_IN_BLOCK = re.compile(r"(^|\.)\d+\.")


@dataclass(frozen=True)
class Skeleton:
    """linears: (out_features, in_features) of all linear layers inside numbered blocks, by path.

    base_prefix: name of the base model inside the model class, such as "model" in Llama's.
    unfit: those among them that cannot be sketched, by path, each with the reason.
    """

    linears: dict[str, tuple[int, int]]
    base_prefix: str
    unfit: dict[str, str]

    def stored_name(self, module: str, tensors: Container[str]) -> str | None:
        """The path under which the checkpoint stores a module, None when it has none such."""
        names = aliases(module, self.base_prefix)
        return next((name for name in names if name + ".weight" in tensors), None)


def aliases(name: str, base_prefix: str) -> tuple[str, str, str]:
    """What a module may be called in a model or its checkpoint, most likely first: transformers
    adds and drops the base model's prefix ("transformer.", "bert.") while loading."""
    prefix = base_prefix + "."
    return name, name.removeprefix(prefix), prefix + name


def by_model_name(
    model: PreTrainedModel, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Tensors of a checkpoint by what the model calls them, as transformers renames them.

    GPT-NeoX's head is stored as "embed_out.weight" and called "lm_head.weight". Tensors that are
    fused, split or transposed while loading are left out: the model has them otherwise.
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
        if new not in own:  # then transformers adds or drops the base prefix alone
            new, converter = rename_source_key(name, [], [], model.base_model_prefix, own)
        if converter is None:
            found[new] = tensor
    return found


def read_skeleton(
    folder: Path, config: dict[str, Any], *, trust_remote_code: bool = False
) -> Skeleton:
    """Builds the model of a folder's config on the meta device.

    Raises SourceError when transformers does not know the architecture, or knows it only through
    code in the repository and `trust_remote_code` is off.
    """
    import torch

    model_class = _model_class(folder, config, trust_remote_code)
    with torch.device("meta"):
        model = _build(model_class, folder, config, trust_remote_code)
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and is_in_block(name)
    }
    return Skeleton(linears, str(model_class.base_model_prefix), _unfit(model, linears))


def _unfit(model: PreTrainedModel, linears: Collection[str]) -> dict[str, str]:
    read = dict.fromkeys(
        _read_as_floats(model) & set(linears),
        "the model's code needs its weight in floating point",
    )
    pairs: dict[str, str] = getattr(model, "all_tied_weights_keys", {})  # not of all remote code
    tied = {*pairs, *pairs.values()}
    return read | {
        name: "the model ties its weight to that of another layer"
        for name in linears
        if name + ".weight" in tied
    }


def _read_as_floats(model: PreTrainedModel) -> set[str]:
    """Modules whose weight other code reads than their own.

    Models look at the dtype of weights that transformers keeps in float32; mixers of state-space
    models, which have A and D, give those of all layers from their scan on to one kernel.
    """
    kept = (model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict)
    patterns = "|".join(re.escape(name) for names in kept for name in names or ())
    declared = re.compile(rf"(^|\.)({patterns})(\.|$)")
    found = set()
    for name, module in model.named_modules():
        if patterns and declared.search(name + ".weight"):
            found.add(name)
        if hasattr(module, "A_log") and hasattr(module, "D"):
            found |= {f"{name}.{part}" for part in ("x_proj", "dt_proj", "out_proj")}
    return found


def is_in_block(name: str) -> bool:
    """Whether a path leads through a numbered block."""
    return _IN_BLOCK.search(name) is not None


def numbers_starred(name: str) -> str:
    """A path with a star for each of its numbers: the same for a layer of every block."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _model_class(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> Any:
    import transformers

    architecture = config["architectures"][0]
    known = getattr(transformers, architecture, None)
    if known is not None:
        return known
    remote = remote_class(config.get("auto_map"), architecture)
    if remote is None:
        raise SourceError(
            f"transformers {transformers.__version__} does not know the architecture "
            f"{architecture!r}"
        )
    if not trust_remote_code:
        raise SourceError(
            f"the architecture {architecture!r} is code in the model's repository: read it, then "
            f"allow it with --trust-remote-code"
        )
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(remote[1], str(folder))


def remote_class(auto_map: dict[str, Any] | None, architecture: str) -> tuple[str, str] | None:
    """The Auto class that finds an architecture in the code of a model's repository, and where it
    is there; None when it is not. auto_map: of the model's config."""
    references = (auto_map or {}).items()  # names, and lists of them and null
    named = [(auto, name) for auto, name in references if isinstance(name, str)]
    return next((pair for pair in named if pair[1].endswith("." + architecture)), None)


def build_empty(
    folder: Path, config: dict[str, Any], *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a folder's config with buffers, but with parameters on the meta device.

    Raises SourceError as `read_skeleton` does.
    """
    from accelerate import init_empty_weights

    model_class = _model_class(folder, config, trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = _build(model_class, folder, config, trust_remote_code)
        return model


def _build(model_class: Any, folder: Path, config: dict[str, Any], trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoConfig

    try:
        parsed = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.random.fork_rng(devices=[]):  # DiffLlama draws numbers as it is made
            return model_class(parsed)
    except Exception as error:  # whatever a model's code makes of a config that does not suit it
        reason = one_line(error)
        raise SourceError(
            f"transformers cannot build {config['architectures'][0]} from {folder / 'config.json'}"
            f": {reason}"
        ) from error
