"""Read a checkpoint in a folder: config and headers of its tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
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
    open_shards,
    read_json,
    summary,
)

from .quantized.dense import SourceQuantization, dense_form
from .quantized.methods import refuse_unreadable
from .reading import stored_parts

ADAPTER_CONFIG = "adapter_config.json"

#: Endings of files with weights, in the order in which a message shows what was found.
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pth", ".pt", ".h5", ".msgpack")


@dataclass(frozen=True)
class DenseCheckpoint:
    """Hold a source that has been opened.

    Attributes:
        folder: Folder of the checkpoint.
        config: The parsed `config.json`, as a dense model has it.
        tensors: Every tensor by name, in the order of the files and of the data in each file. The
            weights of a quantized source are in here as the dense weights that they stand for.
        quantization: How the source is quantized. None: it is dense.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    quantization: SourceQuantization | None = None

    @property
    def weight_files(self) -> list[Path]:
        """Return the files that hold the tensors, sorted."""
        return sorted({part.file for t in self.tensors.values() for part in stored_parts(t)})


def open_dense(folder: Path, tensors: dict[str, StoredTensor]) -> DenseCheckpoint:
    """Read the config of a folder, and order its tensors by file and offset.

    Args:
        folder: Folder with the config.
        tensors: Every tensor by name, in any order.

    Returns:
        The checkpoint.

    Raises:
        SourceError: If the config cannot be used, as in `read_config`, or quantized weights do not
            fit their scales.
    """
    config, tensors, about = dense_form(read_config(folder / CONFIG_FILE), tensors, folder)
    ordered = sorted(tensors.values(), key=lambda tensor: (tensor.file.name, tensor.offset))
    return DenseCheckpoint(folder, config, {tensor.name: tensor for tensor in ordered}, about)


def read_config(path: Path) -> dict[str, Any]:
    """Read the `config.json` of a model whose weights can be read.

    Args:
        path: The file.

    Returns:
        The parsed config.

    Raises:
        SourceError: If it is not valid JSON, names no model class, or describes weights that are
            quantized by a method that is not read.
    """
    try:
        config = read_json(path)
    except FormatError as error:
        raise SourceError(f"{path.parent}: {error}") from error
    if not isinstance(config, dict) or not _are_names(config.get("architectures")):
        raise SourceError(
            f"{path}: no architectures are named, expected a list such as ['LlamaForCausalLM']; "
            f"get the config again from the model's page"
        )
    refuse_unreadable(config, str(path))
    return config


def checked_shards(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of a folder's safetensors files.

    Args:
        folder: Folder of the checkpoint.

    Returns:
        Every tensor by name.

    Raises:
        SourceError: If the folder has no such files, one of them is missing or damaged, or there is
            an adapter next to them.
    """
    refuse_adapter([path.name for path in folder.iterdir()], str(folder))
    if not any((folder / name).exists() for name in (SINGLE_SHARD, INDEX_FILE)):
        inside = [path.relative_to(folder) for depth in ("*", "*/*") for path in folder.glob(depth)]
        raise no_weights(map(str, inside), str(folder))
    try:
        return open_shards(folder)
    except FormatError as error:
        raise SourceError(f"{folder}: {error}") from error


def refuse_adapter(names: Collection[str], where: str) -> None:
    """Raise SourceError if there is an adapter of peft among the files of a model.

    transformers would load it together with the weights, and a sketch would lack it.

    Args:
        names: Names of the files.
        where: Folder or repository, for the message.
    """
    if ADAPTER_CONFIG not in names:
        return
    if CONFIG_FILE not in names:
        raise SourceError(
            f"{where}: only an adapter ({ADAPTER_CONFIG}, no {CONFIG_FILE}), expected a whole "
            f"model; load it with peft on the base model that {ADAPTER_CONFIG} names, call "
            f"merge_and_unload(), and save the result with save_pretrained()"
        )
    raise SourceError(
        f"{where}: {ADAPTER_CONFIG} lies next to the weights, expected a model without adapter; "
        f"merge the adapter with peft's merge_and_unload() and save the result, or remove "
        f"{ADAPTER_CONFIG}"
    )


def no_weights(names: Iterable[str], where: str) -> SourceError:
    """Return the error for a model without weights that can be read, not raised.

    Args:
        names: Paths of its files.
        where: Folder or repository, for the message.
    """
    found = [name for name in names if name.endswith(_WEIGHT_SUFFIXES)]
    found.sort(key=lambda name: ([name.endswith(s) for s in _WEIGHT_SUFFIXES].index(True), name))
    problem = (
        f"{where}: no {SINGLE_SHARD} and no {INDEX_FILE} in it "
        f"(found {summary(found, ', ') or 'no weights'})"
    )
    if any(re.search(r"(^|/)model-\d+-of-\d+\.safetensors$", name) for name in found):
        return SourceError(f"{problem}; get the index of the shards, {INDEX_FILE}, too")
    if any(name.endswith(".safetensors") for name in found):
        return SourceError(
            f"{problem}; only weights as transformers saves them are read: pass the folder that "
            f"holds {SINGLE_SHARD}, or load the model with transformers and save it again"
        )
    return SourceError(
        f"{problem}; only safetensors weights are read: load the model with transformers and save "
        f"it again"
    )


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(x, str) for x in value)
