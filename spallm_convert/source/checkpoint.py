"""A dense checkpoint in a folder: its config, its tensors by their headers, and its other files."""

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

#: What belongs to a model besides its weights: tokenizer, chat template, generation, processor,
#: custom code and licence files.
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
    "trainer_state.json",  # this and the next are what Trainer leaves
    "*_results.json",
)


@dataclass(frozen=True)
class DenseCheckpoint:
    """A source that has been opened: its folder, parsed config, and tensors in source order."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def weight_files(self) -> list[Path]:
        """Return the files that hold the tensors, sorted."""
        return sorted({tensor.file for tensor in self.tensors.values()})


def open_dense(folder: Path, tensors: dict[str, StoredTensor]) -> DenseCheckpoint:
    """A folder's config and its tensors, brought into source order."""
    ordered = sorted(tensors.values(), key=lambda tensor: (tensor.file.name, tensor.offset))
    return DenseCheckpoint(
        folder, read_config(folder / CONFIG_FILE), {tensor.name: tensor for tensor in ordered}
    )


def read_config(path: Path) -> dict[str, Any]:
    """The source's `config.json`; refuses models that are quantized already."""
    try:
        config = load_json(path.read_bytes(), CONFIG_FILE)
    except FormatError as error:
        raise SourceError(f"{path.parent}: {error}") from error
    if not isinstance(config, dict) or not _are_names(config.get("architectures")):
        raise SourceError(f"{path}: no architectures are named, so no model class is known")
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise SourceError(f"{path}: already quantized ({method}), expected dense weights")
    return config


def checked_shards(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a folder's safetensors files by name.

    Raises SourceError when the folder has no such files, or one of them is damaged.
    """
    if not any((folder / name).exists() for name in (SINGLE_SHARD, INDEX_FILE)):
        others = [path.name for path in folder.iterdir() if path.suffix in {".bin", ".pth", ".pt"}]
        found = f"found {', '.join(sorted(others)[:3])}" if others else "found no weights at all"
        raise SourceError(
            f"{folder}: no {SINGLE_SHARD} and no {INDEX_FILE} in it ({found}); "
            f"pickled weights are not read, save the model as safetensors first"
        )
    try:
        return open_shards(folder)
    except FormatError as error:
        raise SourceError(f"{folder}: {error}") from error


def extra_files(folder: Path) -> list[str]:
    """Files in a model's folder that belong to it besides its weights, relative to the folder."""
    paths = (path for pattern in EXTRA_FILES for path in folder.glob(pattern))
    names = {path.relative_to(folder).as_posix() for path in paths if path.is_file()}
    return sorted(name for name in names if is_extra_file(name))


def is_extra_file(name: str) -> bool:
    """Whether a file of a repository belongs to the model besides its weights."""
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
