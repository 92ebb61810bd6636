"""Read and write tables-only checkpoints.

The tables file describes itself, and one rename puts it in place. So a process may be killed at any
moment: the folder holds the former set or the new one. `sketch_tables.json` repeats the description
for people, and for versions that knew no other.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spallm_convert.errors import FormatError, OptionError, SourceError, one_line
from spallm_convert.paths import user_path
from spallm_convert.source.hub import download_tables
from spallm_formats import (
    TABLES_DTYPES,
    TABLES_FILE,
    TABLES_METADATA_FILE,
    StoredTensor,
    TablesMetadata,
    TensorSpec,
    build_header,
    header_metadata,
    header_text,
    open_regular,
    parse_header,
    read_json,
    shown,
    to_json,
)
from spallm_formats.durable import flush_folder, replacing, write_atomic

#: Dtypes of the tensors in a file, by the names that safetensors gives them.
DTYPES = dict(
    zip(TABLES_DTYPES, (torch.bfloat16, torch.float16, torch.float32, torch.float64), strict=True)
)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: The most bytes of `sketch_tables.json` that are read.
_MAX_DESCRIPTION = 1 << 16


@dataclass(frozen=True)
class StoredTables:
    """Hold an open tables-only checkpoint whose header and description have been checked.

    Attributes:
        metadata: The description.
        tensors: Every tensor by name.
    """

    metadata: TablesMetadata
    tensors: dict[str, StoredTensor]
    _file: BufferedReader

    def read(self, name: str) -> Tensor:
        """Return a tensor, which has one of the dtypes in `DTYPES`.

        Raises:
            FormatError: If the file has been cut off since it was opened.
        """
        stored = self.tensors[name]
        dtype = DTYPES[stored.dtype]
        if not stored.nbytes:  # torch makes no tensor of an empty buffer
            return torch.empty(stored.shape, dtype=dtype)
        data = bytearray(stored.nbytes)  # not mapped: the memory of a file may vanish
        self._file.seek(stored.offset)
        if self._file.readinto(data) != len(data):
            raise FormatError(f"{TABLES_FILE}: the file is truncated, get it again")
        return torch.frombuffer(data, dtype=dtype).reshape(stored.shape)


def find_tables(source: str | os.PathLike[str], revision: str | None) -> Path:
    """Return the folder of a tables-only checkpoint, downloaded if it is an id on the Hub.

    Raises:
        FormatError: If it holds no tables.
        SourceError: If it cannot be found or downloaded.
    """
    folder = user_path(source)
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except OSError as error:  # the name is longer than any file's, for example
        name = shown(os.fspath(source))
        raise SourceError(f"no such folder: {name} ({one_line(error)})") from error
    if not is_folder:
        if exists or str(source).startswith((".", "/", "~")):
            raise SourceError(f"no such folder: {source}")
        folder = download_tables(str(source), revision)
    if not (folder / TABLES_FILE).exists():
        raise FormatError(
            f"{source} holds no sketch tables: {TABLES_FILE} is missing; save_tables writes it"
        )
    return folder


@contextlib.contextmanager
def open_tables(folder: Path) -> Iterator[StoredTables]:
    """Open a tables-only checkpoint for reading, in a `with` block.

    Args:
        folder: Its folder, from `find_tables`.

    Raises:
        FormatError: If the header or the description breaks the format, or a file cannot be read.
    """
    path = folder / TABLES_FILE
    try:
        with open_regular(path) as file:  # opened once: another process may replace it
            yield stored_tables(file, folder)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {one_line(error)}") from error


def stored_tables(file: BufferedReader, folder: Path) -> StoredTables:
    """Read the header and the description of an open tables file.

    Args:
        file: The file, at its start.
        folder: Its folder, for older checkpoints, whose description is a file of its own.

    Raises:
        FormatError: If the header or the description breaks the format.
    """
    text, file_bytes = header_text(file, TABLES_FILE)
    tensors = parse_header(text, folder / TABLES_FILE, file_bytes)
    metadata = TablesMetadata.from_header(header_metadata(text, TABLES_FILE))
    return StoredTables(metadata or _separate_description(folder), tensors, file)


def write_tables(
    folder: Path, tensors: Mapping[str, Tensor], metadata: TablesMetadata, *, overwrite: bool
) -> None:
    """Write a tables-only checkpoint. At every moment, the folder holds the former or the new one.

    Args:
        folder: Folder to write to. It is created if it does not exist.
        tensors: Tensors on the CPU, by name.
        metadata: The description.
        overwrite: Replace tables in the folder.

    Raises:
        OptionError: If the folder already holds tables and `overwrite` is False, or holds something
            else under their names, or a tensor has another dtype than those in `DTYPES`.
    """
    _check_folder(folder, overwrite=overwrite)
    header, offsets = build_header(_specs(tensors), metadata.to_header())
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / TABLES_FILE) as file:
        file.write(header)
        for name in sorted(tensors, key=offsets.__getitem__):
            data = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8)
            file.write(np.from_dlpack(data).data)  # `Tensor.numpy` would pin memory of the model
    # Before the description is replaced: older tables have no other.
    flush_folder(folder)
    write_atomic(folder / TABLES_METADATA_FILE, to_json(metadata.to_json()))
    flush_folder(folder)


def _separate_description(folder: Path) -> TablesMetadata:
    path = folder / TABLES_METADATA_FILE
    if not path.exists():
        raise FormatError(
            f"{folder}: {TABLES_FILE} does not say which base it is for, and "
            f"{TABLES_METADATA_FILE} is missing; get that file too, or save the tables again"
        )
    return TablesMetadata.from_json(read_json(path, _MAX_DESCRIPTION))


def _check_folder(folder: Path, *, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{folder} is a file, expected a folder or a new name")
    for path in (folder / TABLES_FILE, folder / TABLES_METADATA_FILE):
        if not os.path.lexists(path):
            continue
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise OptionError(
                f"{path} is not a file, so tables cannot be saved there; remove it, or choose "
                f"another folder"
            )
        if not overwrite:
            raise OptionError(f"{folder} already holds sketch tables; overwrite=True replaces them")


def _specs(tensors: Mapping[str, Tensor]) -> list[TensorSpec]:
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise OptionError(
                f"{name} is {tensor.dtype}, which cannot be saved with tables; accepted are "
                f"{', '.join(map(str, _NAMES))}"
            )
    return [TensorSpec(name, _NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
