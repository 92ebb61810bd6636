"""Keep calibrated modules in files below the work folder, until the checkpoint is written.

Each block is one file, which is written when all its modules are sketched. Healed tables are one
more file. An interrupted conversion continues from these files. The name of a file contains a
digest of its contents, and a damaged file counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from spallm_convert.sketch.layer import Layer
from spallm_formats import (
    INDEX_MAP_SUFFIX,
    TABLE_DTYPES,
    TABLE_SUFFIX,
    FormatError,
    SketchedModule,
    SketchMetadata,
    StoredTensor,
    TensorSpec,
    load_json,
    read_header,
    sha256,
    to_float32,
    unpack,
)
from spallm_formats.durable import write_atomic
from spallm_kernels import hash_codes, look_up

_SUMS, _HEALING, _EXPERTS = "sums", "healing", "experts"
_BLOCK, _HEALED = "block", "healed"
#: Dtype and shape of a stored tensor. NumPy has no bfloat16, so its bits are stored as U16.
_Kind = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class CalibratedModule:
    """A sketched module, as it is stored.

    Attributes:
        index_map: Packed codes, uint8 [out_features, row_bytes]. The number of experts stands
            before it if there are any.
        table: Tables in their stored dtype, [out_features, groups, 2^bits], with experts likewise.
        sums: Squared error and squared norm of the weights, then of the outputs on the calibration
            text, before any healing.
    """

    index_map: np.ndarray[Any, np.dtype[np.uint8]]
    table: np.ndarray[Any, Any]
    sums: Sequence[float]

    def codes(
        self, module: SketchedModule, metadata: SketchMetadata
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the module's codes, uint8 [rows, in_features], those of all experts together."""
        if metadata.mapping == "hash":
            shape = module.out_features, module.in_features
            codes = hash_codes(*shape, module.bits, metadata.hash_seed)
            return np.tile(codes, (module.rows // module.out_features, 1))
        packed = self.index_map.reshape(module.rows, -1)
        return unpack(packed, module.bits, module.in_features)

    def wide_table(
        self, module: SketchedModule, metadata: SketchMetadata
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the tables in float32, [rows, groups, 2^bits], those of all experts together."""
        stored = TABLE_DTYPES[metadata.table_dtype]
        shape = module.rows, module.groups_per_row, module.entries
        return to_float32(self.table.tobytes(), stored).reshape(shape)

    def dense(
        self, module: SketchedModule, metadata: SketchMetadata
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the weights that the sketch stands for, float32 [rows, in_features]."""
        return look_up(self.wide_table(module, metadata), self.codes(module, metadata))


class _Kept(NamedTuple):
    """The file of a module, dtype and shape of its index map and table, and its sums."""

    path: Path
    tensors: tuple[_Kind, _Kind]
    sums: Sequence[float]


class CalibratedModules:
    """The sketched modules of a model, in files below a folder, one file per block.

    Args:
        folder: The folder. Sound files that an earlier run left are used, damaged ones are not.
        check: Called before a file is written. If it raises an error because the source has
            changed, nothing is written.

    Attributes:
        healing: The divergence from the dense model before and after healing. None without healed
            tables.
    """

    def __init__(self, folder: Path, check: Callable[[], None] = lambda: None) -> None:
        self._folder, self._check = folder, check
        self._kept: dict[str, _Kept] = {}
        self._experts: dict[Path, list[int]] = {}
        for path in sound_files(folder, _BLOCK):
            self._keep(path)
        self._healed: Path | None = None
        self.healing: dict[str, float] | None = None
        self._healed_sums: dict[str, Sequence[float]] = {}
        for path in sound_files(folder, _HEALED):
            if (found := _read_healed(path, self._kept)) is not None:
                self._healed, (self.healing, self._healed_sums) = path, found

    def __contains__(self, name: object) -> bool:
        """Return whether a module is stored, by its name in the checkpoint."""
        return name in self._kept

    @property
    def experts(self) -> tuple[int, int]:
        """Return the number of experts that few tokens reached, and of all calibrated experts."""
        few, seen = zip((0, 0), *self._experts.values(), strict=True)
        return sum(few), sum(seen)

    def _keep(self, path: Path) -> None:
        modules, experts = _read_block(path)
        self._kept |= modules
        if modules:
            self._experts[path] = experts

    def has(self, layers: Iterable[Layer], metadata: SketchMetadata) -> bool:
        """Return whether all layers are stored with the bits, groups and dtype that are wanted."""
        mapping, dtype = metadata.mapping, metadata.table_dtype
        return all(
            layer.name in self._kept
            and self._kept[layer.name].tensors
            == tuple(map(_kind, layer.module.tensors(layer.name, mapping, dtype)))
            for layer in layers
        )

    def read(self, name: str) -> CalibratedModule:
        """Return a module by its name in the checkpoint, with its healed table if there is one."""
        path, _, sums = self._kept[name]
        with safe_open(path, framework="numpy") as file:
            index_map = file.get_tensor(name + INDEX_MAP_SUFFIX)
            table = file.get_tensor(name + TABLE_SUFFIX)
        if self._healed is not None:
            with safe_open(self._healed, framework="numpy") as file:
                table = file.get_tensor(name + TABLE_SUFFIX)
            sums = [*self._healed_sums[name], *sums[2:]]
        return CalibratedModule(index_map, table, sums)

    def write(
        self,
        number: int,
        modules: dict[str, CalibratedModule],
        experts: tuple[int, int] = (0, 0),
    ) -> None:
        """Write the modules of a block, all of them or none.

        Args:
            number: Number of the block.
            modules: The modules, by their names in the checkpoint.
            experts: Number of experts of the block that few tokens reached, and of all.
        """
        self._check()
        tensors: dict[str, Any] = {}
        for name, module in modules.items():
            tensors[name + INDEX_MAP_SUFFIX] = module.index_map
            tensors[name + TABLE_SUFFIX] = module.table
        sums = {name: module.sums for name, module in modules.items()}
        metadata = {_SUMS: json.dumps(sums), _EXPERTS: json.dumps(experts)}
        data = save(tensors, metadata=metadata)
        self._keep(write_sound(self._folder, f"{_BLOCK}-{number:05d}", data))

    def forget_healed(self) -> None:
        """Delete the healed tables, so that `read` returns the tables from before healing."""
        for path in self._folder.glob(f"{_HEALED}-*.safetensors"):
            path.unlink()
        self._healed = self.healing = None

    def write_healed(
        self, tables: dict[str, tuple[Any, Sequence[float]]], healing: dict[str, float]
    ) -> None:
        """Write healed tables for all modules, in place of the tables of the blocks.

        Args:
            tables: For each module, by its name in the checkpoint: its table in the stored dtype,
                and the squared error and squared norm of its weights.
            healing: The divergence from the dense model before and after healing.
        """
        self._check()
        tensors = {name + TABLE_SUFFIX: table for name, (table, _) in tables.items()}
        sums = {name: sums for name, (_, sums) in tables.items()}
        metadata = {_SUMS: json.dumps(sums), _HEALING: json.dumps(healing)}
        self._healed = write_sound(self._folder, _HEALED, save(tensors, metadata=metadata))
        self.healing, self._healed_sums = healing, sums


def calibrated_bytes(metadata: SketchMetadata, *, healed: bool) -> int:
    """Estimate the bytes of the files of all blocks, with healed tables if `healed`."""
    specs = metadata.tensors()
    tables = sum(spec.nbytes for name, spec in specs.items() if name.endswith(TABLE_SUFFIX))
    return sum(spec.nbytes for spec in specs.values()) + (tables if healed else 0)


def kept_bytes(folder: Path) -> int:
    """Return the bytes of the files of blocks and healed tables below a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_sound(folder: Path, name: str, data: bytes, suffix: str = ".safetensors") -> Path:
    """Write a file with a digest of its contents in its name, and delete older ones.

    Args:
        folder: The folder to write into.
        name: The name without digest and suffix. Older files of that name are deleted.
        data: The contents.
        suffix: The suffix of the name.

    Returns:
        Path of the file.
    """
    path = folder / f"{name}-{hashlib.sha256(data).hexdigest()}{suffix}"
    write_atomic(path, data)
    for older in set(folder.glob(f"{name}-*{suffix}")) - {path}:
        older.unlink()
    return path


def sound_files(folder: Path, name: str, suffix: str = ".safetensors") -> Iterator[Path]:
    """Yield the files of `write_sound` whose contents match the digest in their names.

    Args:
        folder: The folder of the files.
        name: How the names start, before a hyphen.
        suffix: The suffix of the names.
    """
    for path in sorted(folder.glob(f"{name}-*{suffix}")):
        if path.stem.endswith(f"-{sha256(path)}"):
            yield path


def _kind(tensor: TensorSpec) -> _Kind:
    return "U16" if tensor.dtype == "BF16" else tensor.dtype, tensor.shape


def _read_block(path: Path) -> tuple[dict[str, _Kept], list[int]]:
    """Return the modules in the file of a block, and the numbers of experts that `write` got.

    Return no modules if it is not a file that `write` wrote.
    """
    tensors, metadata = _read_parts(path)
    sums, experts = metadata.get(_SUMS), metadata.get(_EXPERTS)
    if not are_sums(sums, 4) or experts is None or not are_sums({"": experts}, 2):
        return {}, [0, 0]
    found = {}
    for name, numbers in sums.items():
        stored = [tensors.get(name + suffix) for suffix in (INDEX_MAP_SUFFIX, TABLE_SUFFIX)]
        codes, table = stored
        if codes is None or table is None:
            return {}, [0, 0]
        found[name] = _Kept(path, (_kind(codes), _kind(table)), numbers)
    return found, list(map(int, experts))


def _read_healed(
    path: Path, kept: dict[str, _Kept]
) -> tuple[dict[str, float], dict[str, Sequence[float]]] | None:
    """Return the divergences and sums in a file of healed tables.

    Return None if it is not one that `write_healed` wrote for the modules that are kept.
    """
    tensors, metadata = _read_parts(path)
    healing, sums = metadata.get(_HEALING), metadata.get(_SUMS)
    kinds = {name: _kind(tensor) for name, tensor in tensors.items()}
    if not are_sums(sums, 2) or not isinstance(healing, dict):
        return None
    sound = (
        sums.keys() == kept.keys()
        and kinds == {name + TABLE_SUFFIX: module.tensors[1] for name, module in kept.items()}
        and healing.keys() == {"kl_before", "kl_after"}
        and all(map(is_finite, healing.values()))
    )
    return (healing, dict(sums)) if sound else None


def are_sums(value: Any, count: int) -> TypeGuard[dict[str, list[float]]]:
    """Return whether a value from a file is an object of lists of `count` numbers."""
    return isinstance(value, dict) and all(
        isinstance(sums, list) and len(sums) == count and all(map(is_finite, sums))
        for sums in value.values()
    )


def is_finite(value: Any) -> bool:
    """Return whether a value from a JSON file is a finite number (True is none)."""
    return type(value) in {int, float} and -sys.float_info.max <= value <= sys.float_info.max


def _read_parts(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Return the tensors and the metadata of a safetensors file; nothing if it is not one."""
    try:
        tensors = read_header(path)
        with safe_open(path, framework="numpy") as file:
            texts = file.metadata() or {}
        return tensors, {key: load_json(text.encode(), path.name) for key, text in texts.items()}
    except (FormatError, SafetensorError):
        return {}, {}
