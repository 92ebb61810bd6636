"""`load_sketched`: a sketched checkpoint as a transformers model, ready to run and to train."""

from __future__ import annotations

import os
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

from spallm_convert.errors import FormatError, SourceError
from spallm_convert.hub_errors import clear_errors
from spallm_convert.paths import user_path
from spallm_convert.source.skeleton import remote_class
from spallm_formats import SketchedCheckpoint, SketchMetadata

from . import quantizer  # noqa: F401  registers the checkpoint's quantizer
from .tables import load_tables

#: Options of `from_pretrained` that say where files come from.
_HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "subfolder", "token"}


def load_sketched(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: Any = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
    tables: str | os.PathLike[str] | None = None,
    tables_revision: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Loads a sketched checkpoint: a local folder or an id on the Hub.

    dtype: of the activations and of everything but the index maps ("auto": that of the
    checkpoint). tables: a tables-only checkpoint to use instead of the model's own tables, a folder
    or an id on the Hub (see `load_tables`) with its revision. device_map and other `options` are
    those of `from_pretrained`. The model is in evaluation mode, its sketch tables are the only
    trainable parameters, and `model.set_tables(name)` changes between sets of tables.
    Raises FormatError when the checkpoint breaks the format, SourceError when it cannot be had.
    """
    dtype = options.pop("torch_dtype", dtype)  # its former name, which transformers takes too
    name = os.fspath(model)
    path = user_path(name)
    if path.is_dir():
        SketchedCheckpoint.open(path / options.get("subfolder", ""))
        name = str(path)
    elif path.exists() or name.startswith((".", "/", "~")):
        raise SourceError(f"no such folder: {name}")
    with clear_errors(name, SourceError):
        config = AutoConfig.from_pretrained(
            name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            **{key: options[key] for key in _HUB_OPTIONS & options.keys()},
        )
        quantization = getattr(config, "quantization_config", None)
        if quantization is None:
            raise FormatError(f"{name}: config.json has no quantization_config, not sketched")
        SketchMetadata.from_json(quantization)
        loaded: PreTrainedModel
        loaded, found = model_class(config).from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"])[:5])
        raise FormatError(f"{name}: tensors are missing: {missing}")
    if tables is not None:
        load_tables(loaded, tables, revision=tables_revision)
    return loaded


def model_class(config: Any) -> Any:
    """The class that a config names, or the one that finds it in the model's repository."""
    if not config.architectures:
        raise FormatError("config.json: no architectures are named, so no model class is known")
    architecture = config.architectures[0]
    remote = remote_class(getattr(config, "auto_map", None), architecture)
    names = [architecture, *(remote or ())[:1]]
    known = (getattr(transformers, name) for name in names if hasattr(transformers, name))
    return next(known, transformers.AutoModelForCausalLM)
