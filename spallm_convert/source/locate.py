"""The model to convert: a local folder, a repository on the Hub, or a GGUF file.

`locate` finds it and brings what is needed onto this machine; `Source.open` then gives its config
and tensors, reading headers only.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spallm_convert.errors import SourceError
from spallm_convert.paths import user_path
from spallm_formats import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_SHARD,
    FormatError,
    StoredTensor,
    load_json,
    open_shards,
    sha256,
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
_REPOSITORY = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@dataclass(frozen=True)
class DenseCheckpoint:
    """A source that has been opened: its folder, parsed config, and tensors in source order."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class Source:
    """Where a model lies on this machine, and where it came from.

    name: Hub id, or the name of the folder or file; revision: commit on the Hub.
    path: the folder, or the GGUF file.
    """

    name: str
    path: Path
    revision: str | None = None

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"

    def weight_files(self) -> list[Path]:
        """The files that hold the weights, in order."""
        if self.is_gguf:
            return [self.path]
        return sorted({tensor.file for tensor in _checked_shards(self.path).values()})

    def identity(self) -> dict[str, Any]:
        """Name, revision, licence and SHA-256 of every file that decides the result."""
        hashes = {path.name: sha256(path) for path in self.weight_files()}
        if not self.is_gguf:
            for name in (CONFIG_FILE, *extra_files(self.path)):
                hashes[name] = sha256(self.path / name)
        return {
            "model": self.name,
            "revision": self.revision,
            "license": _licence(self.path),
            "files": hashes,
        }

    def open(self, scratch: Path) -> DenseCheckpoint:
        """Opens the checkpoint; a GGUF file is first turned into one below `scratch`."""
        if self.is_gguf:
            from .gguf import dequantized

            return Source(self.name, dequantized(self.path, scratch)).open(scratch)
        return open_dense(self.path, _checked_shards(self.path))


def locate(model: str, revision: str | None = None) -> Source:
    """Finds a model by Hub id, folder or GGUF file; downloads it from the Hub into its cache.

    Raises SourceError naming the model when there is no such thing, it has no safetensors weights,
    or the Hub does not hand it out.
    """
    source = find_here(model, revision)
    if source is None:
        from .hub import download

        folder, commit = download(model, revision)
        source = Source(model, folder, commit)
    return source


def find_here(model: str, revision: str | None = None) -> Source | None:
    """The model as a folder or GGUF file on this machine; None when it can only be a Hub id."""
    if not model:
        raise SourceError("no model is named: expected a folder, a .gguf file or a Hub id")
    path = user_path(model)
    if path.exists() and revision is not None:
        raise SourceError(f"--revision is for models on the Hub, {path} is on this machine")
    if path.suffix == ".gguf" and path.is_file():
        return Source(path.name, path.resolve())
    if path.is_dir():
        return _local(path)
    if path.exists():
        raise SourceError(f"{model} is a file, expected a folder, a .gguf file or a Hub id")
    if not _REPOSITORY.fullmatch(model) or path.suffix == ".gguf":
        raise SourceError(f"no such folder or file: {model}")
    return None


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


def extra_files(folder: Path) -> list[str]:
    """Files in a model's folder that belong to it besides its weights, relative to the folder."""
    paths = (path for pattern in EXTRA_FILES for path in folder.glob(pattern))
    names = {path.relative_to(folder).as_posix() for path in paths if path.is_file()}
    return sorted(name for name in names if is_extra_file(name))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(x, str) for x in value)


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


def _local(path: Path) -> Source:
    if not (path / CONFIG_FILE).is_file():
        raise SourceError(f"{path}: no {CONFIG_FILE} in it")
    return Source(path.resolve().name, path.resolve())


def _checked_shards(folder: Path) -> dict[str, StoredTensor]:
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


def _licence(path: Path) -> dict[str, str] | None:
    """The licence that the source's model card declares, as its metadata says it."""
    card = path / "README.md"
    if not card.is_file():
        return None
    import yaml
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError):  # a card that cannot be parsed declares nothing
        return None
    keys = ("license", "license_name", "license_link")
    return {key: metadata[key] for key in keys if key in metadata} or None
