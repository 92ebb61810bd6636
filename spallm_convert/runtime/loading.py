"""Load a sketched checkpoint as a transformers model, ready to run and to train."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from spallm_convert.errors import FormatError, SourceError, SpallmError, one_line
from spallm_convert.hub_errors import clear_errors
from spallm_convert.paths import user_path
from spallm_convert.source.skeleton import remote_class
from spallm_convert.source.snapshot import download_description
from spallm_formats import CONFIG_FILE, SketchedCheckpoint, shown

from . import quantizer  # noqa: F401  registers the quantizer of sketched checkpoints
from .checking import check_generation_config, read_checked_config
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
    hub = {key: options[key] for key in _HUB_OPTIONS & options.keys()} | {"revision": revision}
    name, folder = _find(os.fspath(model), hub)
    read_checked_config(folder, name)
    trusted = {"trust_remote_code": trust_remote_code}
    with _clear_damage(name, folder):
        config = AutoConfig.from_pretrained(name, **hub, **trusted)
    mismatches_allowed = options.pop("ignore_mismatched_sizes", False)
    loaded: PreTrainedModel
    with _clear_damage(name, folder, config):
        loaded, found = model_class(config).from_pretrained(
            name,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the error of transformers does not name the tensors
            **{"revision": revision} | trusted | options,
        )
    problems = [f"tensor {key!r} is missing" for key in sorted(found["missing_keys"])]
    if not mismatches_allowed:
        problems += [
            f"tensor {key!r} has the shape {list(stored)}, the model expects {list(expected)}"
            for key, stored, expected in sorted(found["mismatched_keys"])
        ]
    if problems:
        raise FormatError([f"{name}: {problem}" for problem in problems])
    if tables is not None:
        load_tables(loaded, tables, revision=tables_revision)
    return loaded


def _find(name: str, hub: dict[str, Any]) -> tuple[str, Path]:
    """Return the name that transformers finds a checkpoint by, and its folder."""
    path = user_path(name)
    if path.is_dir():
        return str(path), path / (hub.get("subfolder") or "")
    if path.exists() or name.startswith((".", "/", "~")):
        raise SourceError(f"no such folder: {name}")
    with clear_errors(name, SourceError):
        return name, download_description(name, **hub)


@contextlib.contextmanager
def _clear_damage(name: str, folder: Path, config: Any = None) -> Iterator[None]:
    """Turn errors that transformers raises because of a damaged checkpoint into a FormatError.

    Args:
        name: Name of the checkpoint.
        folder: Its folder.
        config: Its config, if transformers has parsed it already.
    """
    try:
        with clear_errors(name, SourceError):
            yield
    except (SpallmError, ImportError, MemoryError):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise  # the message of transformers says what to do
        if isinstance(error, OSError) and error.errno is not None:
            raise  # no space on the disk, for example
        if config is not None:  # after the config, transformers downloads the weights
            try:
                SketchedCheckpoint.open(folder)
                check_generation_config(folder)
            except FormatError as found:  # it names everything that is wrong with the files
                raise found from error
        culprit = error if config is None else _why_not_built(config)
        if culprit is None:
            raise  # because of an option, or of the machine
        raise FormatError(
            f"{name}: transformers cannot build the model of {CONFIG_FILE} "
            f"({type(culprit).__name__}: {one_line(culprit)})"
        ) from error


def _why_not_built(config: Any) -> Exception | None:
    """Return the error of building the model of a config without any options and weights."""
    found = model_class(config)
    if not issubclass(found, PreTrainedModel):
        return None  # an Auto class, for code of the repository, which is not run again
    try:
        # DiffLlama draws random numbers when built
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            found(config)
    except Exception as error:  # a model's code may raise anything for a bad config
        return error
    return None


def model_class(config: Any) -> Any:
    """Return the model class that a config names, or the Auto class that finds it.

    Args:
        config: A config of transformers with `architectures`.

    Raises:
        FormatError: If the class is neither part of transformers nor named in the config's
            `auto_map`.
    """
    architecture = config.architectures[0]
    remote = remote_class(getattr(config, "auto_map", None), architecture)
    names = [architecture, *(remote or ())[:1]]
    known = next(filter(_is_model_class, (getattr(transformers, n, None) for n in names)), None)
    if known is None and remote is None:
        raise FormatError(
            f"transformers {transformers.__version__} does not know the architecture "
            f"{shown(architecture)}; a newer version may: pip install --upgrade transformers"
        )
    return known or transformers.AutoModelForCausalLM


def _is_model_class(found: Any) -> bool:
    """Return whether a name of transformers is a model class, or an Auto class of models."""
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found.config_class is not None
    return hasattr(found, "from_config")
