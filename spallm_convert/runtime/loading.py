"""Load a sketched checkpoint as a transformers model, ready to run and to train."""

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

from . import quantizer  # noqa: F401  registers the quantizer of sketched checkpoints
from .tables import load_tables

#: Options of `from_pretrained` that decide where files come from.
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
    """Load a sketched checkpoint as a transformers model.

    The sketch tables are the only trainable parameters (see `set_trainable`). The method
    `model.set_tables(name)` switches between sets of tables (see `load_tables`).

    Args:
        model: A local folder or an id on the Hub.
        revision: Branch, tag or commit of a model on the Hub. None: the default branch.
        dtype: Torch dtype of the activations and of every parameter except the index maps, or its
            name. Tables that are stored in float32 stay in float32. "auto": the dtype of the
            checkpoint.
        device_map: Devices of the modules, as `from_pretrained` of transformers takes them. None:
            the CPU.
        trust_remote_code: Allow model code from the repository.
        tables: A tables-only checkpoint to load in place of the model's own tables: a folder or an
            id on the Hub. It becomes the set "tuned". None: the model's own tables.
        tables_revision: Branch, tag or commit of `tables` on the Hub. None: the default branch.
        options: Other options of `from_pretrained`, such as `cache_dir` or `token`.

    Returns:
        The model, in evaluation mode.

    Raises:
        FormatError: If the checkpoint, or the tables-only checkpoint, breaks the format or does
            not fit.
        SourceError: If the checkpoint cannot be found or downloaded.
    """
    dtype = options.pop("torch_dtype", dtype)  # the former name; transformers accepts it too
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
            raise FormatError(
                f"{name}: config.json has no quantization_config, so this is not a sketched "
                f"checkpoint; convert it first: spallm-convert {name}"
            )
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
    """Return the model class that a config names.

    If transformers does not have that class, return AutoModelForCausalLM, which can find it in the
    model's repository.
    """
    if not config.architectures:
        raise FormatError(
            "config.json: no architectures are named, so the model class is unknown; add "
            "`architectures` with the name of the class"
        )
    architecture = config.architectures[0]
    remote = remote_class(getattr(config, "auto_map", None), architecture)
    names = [architecture, *(remote or ())[:1]]
    known = (getattr(transformers, name) for name in names if hasattr(transformers, name))
    return next(known, transformers.AutoModelForCausalLM)
