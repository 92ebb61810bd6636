"""Read a dense checkpoint in a folder: config, headers of its tensors, and its other files."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spallm_convert.errors import SourceError
from spallm_formats import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_SHARD,
    FormatError,
    StoredTensor,
    load_json,
    open_shards,
)

#: Files that belong to a model besides its weights: tokenizer, chat template, generation config,
#: processor, custom code, licence.
EXTRA_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "*.spm",
    "*.codes",
    "*.tiktoken",
    "*.jinja",
    "*.py",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)

_NOT_EXTRA = (
    "*.index.json",
    CONFIG_FILE,
    "conversion.json",
    "adapter_*",
    "requirements*.txt",
    "trainer_state.json",  # Trainer writes this file and the next
    "*_results.json",
)


@dataclass(frozen=True)
class DenseCheckpoint:
    """Hold a source that has been opened.

    Attributes:
        folder: Folder of the checkpoint.
        config: The parsed `config.json`.
        tensors: Every tensor by name, in the order of the files and of the data in each file.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def weight_files(self) -> list[Path]:
        """Return the files that hold the tensors, sorted."""
        return sorted({tensor.file for tensor in self.tensors.values()})


def open_dense(folder: Path, tensors: dict[str, StoredTensor]) -> DenseCheckpoint:
    """Read the config of a folder, and order its tensors by file and offset.

    Args:
        folder: Folder with the config.
        tensors: Every tensor by name, in any order.

    Returns:
        The checkpoint.

    Raises:
        SourceError: If the config cannot be used, as in `read_config`.
    """
    ordered = sorted(tensors.values(), key=lambda tensor: (tensor.file.name, tensor.offset))
    return DenseCheckpoint(
        folder, read_config(folder / CONFIG_FILE), {tensor.name: tensor for tensor in ordered}
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read the `config.json` of a dense model.

    Args:
        path: The file.

    Returns:
        The parsed config.

    Raises:
        SourceError: If it is not valid JSON, names no model class, or describes a quantized model.
    """
    try:
        config = load_json(path.read_bytes(), CONFIG_FILE)
    except FormatError as error:
        raise SourceError(f"{path.parent}: {error}") from error
    if not isinstance(config, dict) or not _are_names(config.get("architectures")):
        raise SourceError(
            f"{path}: no architectures are named, expected a list such as ['LlamaForCausalLM']; "
            f"get the config again from the model's page"
        )
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise SourceError(
            f"{path}: already quantized ({method}), expected dense weights; "
            f"convert the original model instead"
        )
    return config


def checked_shards(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of a folder's safetensors files.

    Args:
        folder: Folder of the checkpoint.

    Returns:
        Every tensor by name.

    Raises:
        SourceError: If the folder has no such files, or one of them is missing or damaged.
    """
    if not any((folder / name).exists() for name in (SINGLE_SHARD, INDEX_FILE)):
        others = [path.name for path in folder.iterdir() if path.suffix in {".bin", ".pth", ".pt"}]
        found = f"found {', '.join(sorted(others)[:3])}" if others else "found no weights"
        raise SourceError(
            f"{folder}: no {SINGLE_SHARD} and no {INDEX_FILE} in it ({found}); "
            f"only safetensors weights are read: load the model with transformers and save it again"
        )
    try:
        return open_shards(folder)
    except FormatError as error:
        raise SourceError(f"{folder}: {error}") from error


def extra_files(folder: Path) -> list[str]:
    """List the files of a model besides its weights, config and card.

    Args:
        folder: Folder of the model.

    Returns:
        Sorted paths, relative to the folder.
    """
    paths = (path for pattern in EXTRA_FILES for path in folder.glob(pattern))
    names = {path.relative_to(folder).as_posix() for path in paths if path.is_file()}
    return sorted(name for name in names if is_extra_file(name))


def is_extra_file(name: str) -> bool:
    """Return whether `extra_files` lists a file, given its path relative to the model's folder."""
    accepted = any(_matches(name, pattern) for pattern in EXTRA_FILES)
    return (
        accepted
        and not name.startswith(".")
        and not any(fnmatch.fnmatch(name, pattern) for pattern in _NOT_EXTRA)
    )


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatch(name, pattern)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(x, str) for x in value)
