"""Check a sketched checkpoint before its weights are loaded, by `load_sketched` or transformers.

transformers gives the quantizer the files that it has found, in a folder or in the cache of the
Hub. The folder of these files must keep the format, as `verify` checks it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spallm_convert.errors import FormatError
from spallm_convert.source.layer_count import layer_count_problem
from spallm_convert.source.snapshot import ask_for_index
from spallm_formats import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_SHARD,
    SketchedCheckpoint,
    SketchMetadata,
    read_index,
    read_json,
    read_small,
    shown,
)

#: Weights that a model may have beyond its checkpoint, such as a new head.
_NEW_WEIGHTS = 1 << 24
_GENERATION_FILE = "generation_config.json"
#: Dtypes of activations that sketched layers can compute in.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def read_checked_config(folder: Path, name: str) -> dict[str, Any]:
    """Read the config of a sketched checkpoint, and check what is read from it here.

    Args:
        folder: Folder of the checkpoint.
        name: Name of the checkpoint, for messages.

    Returns:
        The parsed `config.json`.

    Raises:
        FormatError: If it is missing or damaged, or the checkpoint is not sketched.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise FormatError(f"{name}: no {CONFIG_FILE}, so the checkpoint is not complete")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("quantization_config") is None:
        raise FormatError(
            f"{name}: {CONFIG_FILE} has no quantization_config, so this is not a sketched "
            f"checkpoint; convert it first: spallm-convert {name}"
        )
    metadata = SketchMetadata.from_json(config["quantization_config"])
    if (folder / INDEX_FILE).exists():
        read_index(folder / INDEX_FILE)  # transformers parses one of any size
    too_many = layer_count_problem(config, len(metadata.modules), "sketched modules")
    problems = [too_many] if too_many else []
    architectures = config.get("architectures")
    if not architectures:
        problems.append(
            f"{CONFIG_FILE}: no architectures are named, so the model class is unknown; add "
            f"`architectures` with the name of the class"
        )
    elif not isinstance(architectures, list) or not all(isinstance(n, str) for n in architectures):
        problems.append(
            f"{CONFIG_FILE}: architectures is {shown(architectures)}, expected a list of names"
        )
    if not isinstance(config.get("auto_map", {}), dict):
        problems.append(
            f"{CONFIG_FILE}: auto_map is {shown(config['auto_map'])}, expected an object"
        )
    if "transformers_weights" in config:
        problems.append(
            f"{CONFIG_FILE}: found transformers_weights, expected weights in {SINGLE_SHARD} or the "
            f"files of {INDEX_FILE}; remove the key"
        )
    if problems:
        raise FormatError(problems)
    return config


def check_files(
    files: Sequence[str] | None, metadata: SketchMetadata, model: torch.nn.Module
) -> None:
    """Check the folder of the files that transformers has found for a model.

    Args:
        files: Paths of the weights. None: there are no files, only a state dict.
        metadata: The `quantization_config` that transformers loads the model with.
        model: The model without weights, as the config describes it.

    Raises:
        FormatError: If the checkpoint breaks the format, or has another `quantization_config`.
    """
    if not files:
        return
    paths = [Path(file) for file in files]
    folders = {path.parent for path in paths}
    if len(folders) > 1:
        raise FormatError(
            f"the index names weights in several folders, such as {shown(str(paths[0]))}, expected "
            f"plain file names"
        )
    (folder,) = folders
    with contextlib.suppress(Exception):  # no network or no token: check the files that are here
        ask_for_index(folder)
    checkpoint = SketchedCheckpoint.open(folder)
    check_generation_config(folder)
    _check_size(model, checkpoint)
    shards = {tensor.file.name for tensor in checkpoint.tensors.values()}
    others = sorted({path.name for path in paths} - shards)
    if others:
        raise FormatError(
            f"{folder}: transformers would load {shown(others[0])}, which is not a file of the "
            f"checkpoint"
        )
    stored = checkpoint.metadata
    # A loaded model's config has the dtype of its tables, which may be another than the stored one.
    if dataclasses.replace(metadata, table_dtype=stored.table_dtype) != stored:
        raise FormatError(
            f"{folder}: the given config has another quantization_config than {CONFIG_FILE}"
        )


def _check_size(model: torch.nn.Module, checkpoint: SketchedCheckpoint) -> None:
    """Refuse a model far larger than its checkpoint: transformers would allocate all of it."""
    sketched = checkpoint.metadata.tensors()
    held = sum(module.weights for module in checkpoint.metadata.modules.values())
    held += sum(t.elements for name, t in checkpoint.tensors.items() if name not in sketched)
    expected = sum(parameter.numel() for parameter in model.parameters())
    if expected > 2 * held + _NEW_WEIGHTS:
        raise FormatError(
            f"{checkpoint.folder}: {CONFIG_FILE} describes a model of {expected:,} weights, but "
            f"the checkpoint holds {held:,}; use the {CONFIG_FILE} that belongs to these weights"
        )


def check_generation_config(folder: Path) -> None:
    """Check the defaults of `generate`, which transformers reads after the weights.

    transformers ignores a file that is not JSON.

    Args:
        folder: Folder of the checkpoint.

    Raises:
        FormatError: If they are JSON, but not an object.
    """
    path = folder / _GENERATION_FILE
    if path.is_file():
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(read_small(path))
            if not isinstance(found, dict):
                raise FormatError(
                    f"{folder}: {_GENERATION_FILE} is {shown(found)}, expected an object"
                )


def check_dtype(dtype: Any) -> None:
    """Check the dtype to load a model in, from its config or from the caller.

    Args:
        dtype: The dtype, or a dict of dtypes of the parts of a model, which is not checked.

    Raises:
        FormatError: If it is not a float of 16 bits or more.
    """
    if not isinstance(dtype, dict) and dtype not in _DTYPES:
        raise FormatError(
            f"a sketched model cannot compute in dtype {shown(dtype)}, expected one of "
            f"{', '.join(map(str, _DTYPES))}; choose one with dtype="
        )
