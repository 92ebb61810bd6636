"""Open a sketched checkpoint, checking everything before anything is allocated.

`SketchedCheckpoint.open` reads `config.json`, the index and the headers, compares them with each
other and reports all problems together. `deep_problems` then reads the data and finds what headers
cannot show: padding bits that are set, and table values that are not finite.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .dtypes import TABLE_DTYPES, to_float32
from .errors import FormatError
from .files import open_regular, read_json
from .header import StoredTensor, TensorSpec, read_header
from .layout import INDEX_FILE, SINGLE_SHARD
from .metadata import SketchMetadata
from .module import TABLE_SUFFIX
from .packing import padding_is_zero
from .publishing import CONFIG_FILE
from .text import shown, summary

#: The config of an adapter of PEFT.
ADAPTER_FILE = "adapter_config.json"
_BLOCK_BYTES = 1 << 26
#: File names of shards: 255 bytes are the most that file systems take.
_SAFE_FILENAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,242}\.safetensors")


def open_shards(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of a safetensors checkpoint, sketched or not, sharded or not.

    Args:
        folder: Folder of the checkpoint.

    Returns:
        Every tensor by name.

    Raises:
        FormatError: If there are no shards, a shard is missing or damaged, or the index and the
            shards disagree; it lists every problem.
    """
    index = folder / INDEX_FILE
    if (folder / SINGLE_SHARD).exists():  # if both exist, transformers uses this one too
        return read_header(folder / SINGLE_SHARD)
    if not index.exists():
        raise FormatError(f"{folder}: found neither {SINGLE_SHARD} nor {INDEX_FILE}")
    weight_map = read_index(index)
    problems: list[str] = []
    tensors: dict[str, StoredTensor] = {}
    for filename in sorted(set(weight_map.values())):
        if not (folder / filename).exists():
            problems.append(f"{INDEX_FILE}: shard {filename} is missing")
        else:
            try:
                found = read_header(folder / filename)
            except FormatError as error:
                problems += error.problems
            else:
                listed = {name for name, shard in weight_map.items() if shard == filename}
                problems += index_problems(filename, set(found), listed)
                tensors |= found
    if problems:
        raise FormatError(problems)
    return tensors


def read_index(index: Path) -> dict[str, str]:
    """Read the weight_map of an index file.

    Args:
        index: The file.

    Returns:
        File names by tensor name.

    Raises:
        FormatError: If it is not valid JSON, has no such map, or names anything but plain file
            names of safetensors files.
    """
    document = read_json(index)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(filename, str) for filename in weight_map.values()
    ):
        raise FormatError(f"{index.name}: expected a weight_map of tensor names to file names")
    if not isinstance(document.get("metadata"), dict):  # transformers cannot read it either
        raise FormatError(f"{index.name}: no metadata, expected an object such as {{}}")
    unsafe = [
        name for name in sorted(set(weight_map.values())) if not _SAFE_FILENAME.fullmatch(name)
    ]
    if unsafe:
        raise FormatError(
            f"{index.name}: expected plain names of safetensors files, found "
            f"{summary([shown(name) for name in unsafe], ', ')}"
        )
    return weight_map


def read_bytes(tensor: StoredTensor, start: int, stop: int) -> bytearray:
    """Read bytes of a tensor.

    Args:
        tensor: The tensor.
        start: First byte, counted from the tensor's first.
        stop: Byte after the last.

    Returns:
        Bytes [start, stop) of the tensor.

    Raises:
        FormatError: If the file ends earlier.
    """
    buffer = bytearray(stop - start)  # headers have been checked against the size of the file
    with open_regular(tensor.file) as file:
        file.seek(tensor.offset + start)
        count = file.readinto(buffer)
    if count != len(buffer):
        raise FormatError(
            f"{tensor.file.name}: tensor {shown(tensor.name)} ends after {start + count} bytes, "
            f"expected {tensor.nbytes}: the file is truncated, get it again"
        )
    return buffer


@dataclass(frozen=True)
class SketchedCheckpoint:
    """Hold a sketched checkpoint on disk whose headers have been checked.

    Attributes:
        folder: Folder of the checkpoint.
        config: The parsed `config.json`.
        metadata: Its `quantization_config`.
        tensors: Every tensor by name, of sketched modules and all others.
    """

    folder: Path
    config: dict[str, Any]
    metadata: SketchMetadata
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> SketchedCheckpoint:
        """Open a checkpoint and check its headers.

        Args:
            folder: Folder of the checkpoint.

        Returns:
            The checkpoint.

        Raises:
            FormatError: If the headers show problems; it lists all of them.
        """
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise FormatError(f"{folder}: no {CONFIG_FILE}, so the checkpoint is not complete")
        config = read_json(path)
        if not isinstance(config, dict) or "quantization_config" not in config:
            raise FormatError(
                f"{folder}: {CONFIG_FILE} has no quantization_config, so this is not a sketched "
                f"checkpoint; convert it first: spallm-convert {folder}"
            )
        metadata = SketchMetadata.from_json(config["quantization_config"])
        if (folder / ADAPTER_FILE).exists():
            raise FormatError(
                f"{folder}: {ADAPTER_FILE} lies beside the checkpoint, so transformers would load "
                f"the model that it names; move the adapter to a folder of its own"
            )
        if (folder / SINGLE_SHARD).exists() and (folder / INDEX_FILE).exists():
            raise FormatError(
                f"{folder}: found both {SINGLE_SHARD} and {INDEX_FILE}, expected one of them"
            )
        tensors = open_shards(folder)
        problems = _sketch_problems(metadata, tensors)
        if problems:
            raise FormatError(problems)
        return cls(folder, config, metadata, tensors)

    def index_map(self, module: str) -> npt.NDArray[np.uint8]:
        """Read the packed index map of a module.

        Args:
            module: Name of the module.

        Returns:
            uint8 [out_features, row_bytes]; row_bytes is 0 for the `hash` mapping. Fused experts
            have one dimension more, in front.
        """
        tensor = self.tensors[self.metadata.modules[module].index_map_name(module)]
        return np.frombuffer(read_bytes(tensor, 0, tensor.nbytes), np.uint8).reshape(tensor.shape)

    def table(self, module: str) -> npt.NDArray[np.float32]:
        """Read the sketch tables of a module.

        Args:
            module: Name of the module.

        Returns:
            float32 [out_features, groups_per_row, 2^bits]. Fused experts have one dimension more,
            in front.
        """
        tensor = self.tensors[self.metadata.modules[module].table_name(module)]
        return to_float32(read_bytes(tensor, 0, tensor.nbytes), tensor.dtype).reshape(tensor.shape)

    def deep_problems(self, largest: float = math.inf) -> Iterator[str]:
        """Read all sketched data and yield one line per problem found in it.

        Args:
            largest: The largest table value that stays finite when the checkpoint is loaded.
        """
        dtype = TABLE_DTYPES[self.metadata.table_dtype]
        for name, module in self.metadata.modules.items():
            index_map = self.tensors[module.index_map_name(name)]
            for rows in _row_blocks(index_map):
                packed = np.frombuffer(rows, np.uint8).reshape(-1, index_map.shape[-1])
                if not padding_is_zero(packed, module.bits, module.in_features):
                    yield f"module {shown(name)}: padding bits of the index map are not zero"
                    break
            for rows in _row_blocks(self.tensors[module.table_name(name)]):
                values = np.abs(to_float32(rows, dtype))
                if not np.isfinite(values).all():
                    yield f"module {shown(name)}: the sketch table holds NaN or infinite values"
                    break
                if (values > largest).any():
                    yield (
                        f"module {shown(name)}: the sketch table holds {values.max():,.0f}, which "
                        f"is infinite in the dtype that config.json names, expected at most "
                        f"{largest:,.0f}"
                    )
                    break


def _row_blocks(tensor: StoredTensor) -> Iterator[bytearray]:
    """Yield the data of a tensor in blocks of whole rows; nothing if it is empty."""
    if not tensor.nbytes:
        return
    row = tensor.nbytes // math.prod(tensor.shape[:-1])
    step = max(1, _BLOCK_BYTES // row) * row
    for start in range(0, tensor.nbytes, step):
        yield read_bytes(tensor, start, min(start + step, tensor.nbytes))


def index_problems(filename: str, found: set[str], listed: set[str]) -> list[str]:
    """Compare the tensors in a file with those that the index lists; one line per difference."""
    return [
        f"{filename}: tensor {shown(name)} is in the index, but not in the file"
        for name in sorted(listed - found)
    ] + [f"{filename}: tensor {shown(name)} is not in the index" for name in sorted(found - listed)]


def _sketch_problems(metadata: SketchMetadata, tensors: dict[str, StoredTensor]) -> list[str]:
    expected = metadata.tensors()
    problems = []
    for name, spec in expected.items():
        stored = tensors.get(name)
        if stored is None:
            problems.append(f"tensor {shown(name)} of a sketched module is missing")
        elif (stored.dtype, stored.shape) != (spec.dtype, spec.shape):
            problems.append(
                f"{stored.file.name}: tensor {shown(name)} is {_described(stored)}, "
                f"expected {_described(spec)}"
            )
    problems += [
        f"{tensor.file.name}: {shown(name)} is a sketch table, but config.json lists no such module"
        for name, tensor in tensors.items()
        if name.endswith(TABLE_SUFFIX) and name not in expected
    ]
    return problems


def _described(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"
