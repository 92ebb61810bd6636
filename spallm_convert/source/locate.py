"""Find the model to convert: a local folder, a GGUF file, or a repository on the Hub.

`locate` finds it and downloads it if needed. `Source.open` then reads its config and the headers of
its weight files.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spallm_convert.errors import SourceError
from spallm_convert.paths import name_as_text, user_path
from spallm_formats import CONFIG_FILE, sha256

from .checkpoint import DenseCheckpoint, checked_shards, open_dense, refuse_adapter
from .extra_files import extra_files, left_behind
from .gguf import dequantized
from .hub import download
from .licence import read_licence

_REPOSITORY = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """Say where a model is on this machine, and where it came from.

    Attributes:
        name: Id on the Hub, or the name of the folder or file.
        path: The folder, or the GGUF file.
        revision: Commit on the Hub. None for a model that was not downloaded.
    """

    name: str
    path: Path
    revision: str | None = None

    @property
    def is_gguf(self) -> bool:
        """Return whether the model is a GGUF file."""
        return self.path.suffix == ".gguf"

    def identity(self, checkpoint: DenseCheckpoint | None = None) -> dict[str, Any]:
        """Describe everything about the model that decides the result of a conversion.

        Every file is read once, to hash it.

        Args:
            checkpoint: What `open` returned, which knows the weight files. None for a GGUF file,
                which is hashed as it is.

        Returns:
            Name, revision, licence, and the SHA-256 of every file by its name.
        """
        weights = [self.path] if checkpoint is None else checkpoint.weight_files
        hashes = {path.name: sha256(path) for path in weights}
        if not self.is_gguf:
            for name in (CONFIG_FILE, *self.extra_files):
                hashes[name] = sha256(self.path / name)
        return {
            "model": self.name,
            "revision": self.revision,
            "license": None if self.is_gguf else read_licence(self.path),
            "files": hashes,
        }

    @functools.cached_property
    def extra_files(self) -> list[str]:
        """Return the files of the model that are copied; none for a GGUF file.

        They are listed once, so that the files that are hashed are the files that are copied.

        Raises:
            SourceError: If one of them cannot be copied, as in `extra_files`.
        """
        return [] if self.is_gguf else extra_files(self.path)

    def left_behind(self) -> list[str]:
        """List the files next to the model that a conversion does not copy."""
        return [] if self.is_gguf else left_behind(self.path, self.extra_files)

    def open(self, scratch: Path) -> DenseCheckpoint:
        """Read the config and the headers of the weight files.

        Args:
            scratch: Folder in which a GGUF file is dequantized first. A checkpoint in a folder does
                not need it.

        Returns:
            The opened checkpoint.

        Raises:
            SourceError: If config or weights are missing, damaged or unsupported.
        """
        if self.is_gguf:
            return Source(self.name, dequantized(self.path, scratch)).open(scratch)
        return open_dense(self.path, checked_shards(self.path))


def locate(model: str, revision: str | None = None) -> Source:
    """Find a model, and download it into the Hub cache if it is not on this machine.

    Args:
        model: Folder, GGUF file or id on the Hub.
        revision: Branch, tag or commit on the Hub. None: the default branch.

    Returns:
        The source.

    Raises:
        SourceError: If there is no such model, it has no safetensors weights, or the Hub refuses
            access.
    """
    source = find_here(model, revision)
    if source is None:
        folder, commit = download(model, revision)
        source = Source(model, folder, commit)
    return source


def find_here(model: str, revision: str | None = None) -> Source | None:
    """Find a model on this machine.

    Args:
        model: Folder, GGUF file or id on the Hub.
        revision: Revision that the user named.

    Returns:
        The source; None if `model` can only be an id on the Hub.

    Raises:
        SourceError: If it is neither, or `revision` is given for a model on this machine.
    """
    if not model:
        raise SourceError("no model is named: expected a folder, a .gguf file or a Hub id")
    path = user_path(model)
    if path.exists() and revision is not None:
        raise SourceError(
            f"--revision is for models on the Hub, {path} is on this machine; remove the option"
        )
    if path.suffix == ".gguf" and path.is_file():
        return Source(name_as_text(path.name), path.resolve())
    if path.is_dir():
        return _local(path)
    if path.exists():
        raise SourceError(f"{model} is a file, expected a folder, a .gguf file or a Hub id")
    if not _REPOSITORY.fullmatch(model) or path.suffix == ".gguf":
        raise SourceError(
            f"no such folder or file: {model}; expected a folder, a .gguf file or a Hub id"
        )
    return None


def _local(path: Path) -> Source:
    if not (path / CONFIG_FILE).is_file():
        refuse_adapter([file.name for file in path.iterdir()], str(path))
        raise SourceError(
            f"{path}: no {CONFIG_FILE} in it, expected the folder of a model for transformers"
        )
    return Source(name_as_text(path.resolve().name), path.resolve())
