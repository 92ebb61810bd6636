"""Calibrated modules on their way into the checkpoint: in files below the work folder.

A block is a file, written when all its modules are sketched; healed tables are one more. A killed
conversion goes on from the files that there are. Each has a digest of its contents in its name: one
that is damaged is taken for one that is not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from spallm_convert.sketch.layer import Layer
from spallm_formats import (
    INDEX_MAP_SUFFIX,
    TABLE_DTYPES,
    TABLE_SUFFIX,
    SketchedModule,
    SketchMetadata,
    read_header,
    sha256,
    to_float32,
    unpack,
)
from spallm_formats.durable import write_atomic
from spallm_kernels import hash_codes

_SUMS, _HEALING = "sums", "healing"
_BLOCK, _HEALED = "block", "healed"


@dataclass(frozen=True)
class CalibratedModule:
    """A sketched module as it goes to disk, and its sums: squared error and norm of the weights,
    then of the outputs on the calibration text, before any healing."""

    index_map: np.ndarray[Any, np.dtype[np.uint8]]
    table: np.ndarray[Any, Any]
    sums: Sequence[float]

    def codes(
        self, module: SketchedModule, metadata: SketchMetadata
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """uint8 [out_features, in_features]."""
        if metadata.mapping == "hash":
            shape = module.out_features, module.in_features
            return hash_codes(*shape, module.bits, metadata.hash_seed)
        return unpack(self.index_map, module.bits, module.in_features)

    def wide_table(
        self, module: SketchedModule, metadata: SketchMetadata
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """float32 [out_features, groups, 2^bits]."""
        stored = TABLE_DTYPES[metadata.table_dtype]
        return to_float32(self.table.tobytes(), stored).reshape(module.table_shape)


class _Kept(NamedTuple):
    """Where a module is, [out_features, groups, 2^bits] of its table, and its sums."""

    path: Path
    table_shape: tuple[int, ...]
    sums: Sequence[float]


class CalibratedModules:
    """The sketched modules of a model, in files of one block each below a folder.

    healing: the divergence from the dense model before and after, once tables have been healed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: dict[str, _Kept] = {}
        for path in sound_files(folder, _BLOCK):
            shapes = {name: tensor.shape for name, tensor in read_header(path).items()}
            for name, sums in _read_metadata(path)[_SUMS].items():
                self._kept[name] = _Kept(path, shapes[name + TABLE_SUFFIX], sums)
        self._healed = next(sound_files(folder, _HEALED), None)
        self.healing: dict[str, float] | None = None
        self._healed_sums: dict[str, Sequence[float]] = {}
        if self._healed is not None:
            metadata = _read_metadata(self._healed)
            self.healing, self._healed_sums = metadata[_HEALING], metadata[_SUMS]

    def has(self, layers: Iterable[Layer]) -> bool:
        """Return whether all layers are kept, with the bits and groups that they have."""
        return all(
            layer.name in self._kept
            and self._kept[layer.name].table_shape == layer.module.table_shape
            for layer in layers
        )

    def read(self, name: str) -> CalibratedModule:
        """A module by its name in the checkpoint."""
        path, _, sums = self._kept[name]
        with safe_open(path, framework="numpy") as file:
            index_map = file.get_tensor(name + INDEX_MAP_SUFFIX)
            table = file.get_tensor(name + TABLE_SUFFIX)
        if self._healed is not None:
            with safe_open(self._healed, framework="numpy") as file:
                table = file.get_tensor(name + TABLE_SUFFIX)
            sums = [*self._healed_sums[name], *sums[2:]]
        return CalibratedModule(index_map, table, sums)

    def write(self, number: int, modules: dict[str, CalibratedModule]) -> None:
        """Keeps the modules of a block, all or none of them."""
        tensors: dict[str, Any] = {}
        for name, module in modules.items():
            tensors[name + INDEX_MAP_SUFFIX] = module.index_map
            tensors[name + TABLE_SUFFIX] = module.table
        sums = {name: module.sums for name, module in modules.items()}
        data = save(tensors, metadata={_SUMS: json.dumps(sums)})
        path = write_sound(self._folder, f"{_BLOCK}-{number:05d}", data)
        for name, module in modules.items():
            self._kept[name] = _Kept(path, module.table.shape, module.sums)

    def forget_healed(self) -> None:
        """Brings back the tables of the blocks."""
        if self._healed is not None:
            self._healed.unlink()
            self._healed = self.healing = None

    def write_healed(
        self, tables: dict[str, tuple[Any, Sequence[float]]], healing: dict[str, float]
    ) -> None:
        """Keeps other tables for all modules, with their squared errors and norms."""
        tensors = {name + TABLE_SUFFIX: table for name, (table, _) in tables.items()}
        sums = {name: sums for name, (_, sums) in tables.items()}
        metadata = {_SUMS: json.dumps(sums), _HEALING: json.dumps(healing)}
        self._healed = write_sound(self._folder, _HEALED, save(tensors, metadata=metadata))
        self.healing, self._healed_sums = healing, sums


def calibrated_bytes(metadata: SketchMetadata, *, healed: bool) -> int:
    """About what all blocks will take, and healed tables if there are to be any."""
    specs = metadata.tensors()
    tables = sum(spec.nbytes for name, spec in specs.items() if name.endswith(TABLE_SUFFIX))
    return sum(spec.nbytes for spec in specs.values()) + (tables if healed else 0)


def kept_bytes(folder: Path) -> int:
    """What the blocks below a folder take, and healed tables."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_sound(folder: Path, name: str, data: bytes, suffix: str = ".safetensors") -> Path:
    """Writes a file with its digest in its name, in the place of others of that name."""
    path = folder / f"{name}-{hashlib.sha256(data).hexdigest()}{suffix}"
    write_atomic(path, data)
    for older in set(folder.glob(f"{name}-*{suffix}")) - {path}:
        older.unlink()
    return path


def sound_files(folder: Path, name: str, suffix: str = ".safetensors") -> Iterator[Path]:
    """Files of `write_sound` whose names begin like that, and that hold what was written."""
    for path in sorted(folder.glob(f"{name}-*{suffix}")):
        if path.stem.endswith(f"-{sha256(path)}"):
            yield path


def _read_metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="numpy") as file:
        return {key: json.loads(text) for key, text in file.metadata().items()}
