"""Parse safetensors headers defensively, and build them deterministically.

A safetensors file is `u64 N | N bytes of JSON | data`. The safetensors library parses it too, but
it reports one error at a time and does not name the tensor. This reader checks the same rules,
reports all problems, reads only the header, and lets tensors be streamed in pieces.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, BinaryIO

from .dtypes import ITEM_BYTES
from .errors import FormatError
from .files import load_json, open_regular, refuse_pointer
from .text import shown

#: Fewer than the 100 MB that the safetensors library allows: parsed, a header takes ten times its
#: size in memory. 300,000 tensors in one file fit.
MAX_HEADER_BYTES = 1 << 25
#: Most dimensions of a tensor, as in torch.
MAX_DIMENSIONS = 64
_METADATA = "__metadata__"
#: Elements of a tensor stay below this number, and so do the products of its first dimensions.
SIZE_LIMIT = 1 << 63
#: Enough for the header of a small file, so that it is read at once.
_FIRST_BYTES = 1 << 16


@dataclass(frozen=True)
class TensorSpec:
    """Describe a tensor.

    Attributes:
        name: Name in the checkpoint.
        dtype: Its safetensors dtype, such as "BF16".
        shape: Its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return self.elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """Describe a tensor in a file.

    Attributes:
        file: The file.
        offset: Offset of its first byte from the start of the file.
    """

    file: Path
    offset: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read which tensors a safetensors file holds.

    Args:
        path: The file.

    Returns:
        Tensors by name, in the order of their data.

    Raises:
        FormatError: If a rule is broken; it names the file and every tensor concerned. Refused are
            a header longer than the file, JSON that does not parse or repeats a key, an unknown
            dtype, a shape that disagrees with its byte range, and data that overlaps, has holes or
            is not exactly as long as the file.
    """
    with open_regular(path) as file:
        text, file_bytes = header_text(file, path.name)
    return parse_header(text, path, file_bytes)


def header_text(file: BinaryIO, name: str) -> tuple[bytes, int]:
    """Read the header of a safetensors file that is open at its start.

    Args:
        file: The file.
        name: Name of the file, for messages.

    Returns:
        The JSON text, for `parse_header` and `header_metadata`, and the size of the file.

    Raises:
        FormatError: If the file cannot have a header of the length that it claims.
    """
    file_bytes = os.fstat(file.fileno()).st_size
    start = file.read(_FIRST_BYTES)
    length = header_length(start, name, file_bytes)
    return start[8 : 8 + length] + file.read(max(0, 8 + length - len(start))), file_bytes


def header_length(start: bytes, name: str, file_bytes: int) -> int:
    """Return the length of the header of a safetensors file.

    Args:
        start: The first bytes of the file, at least 40 if it has as many.
        name: Name of the file, for messages.
        file_bytes: Size of the file.

    Returns:
        Bytes of the JSON text after the first 8 bytes of the file.

    Raises:
        FormatError: If the file cannot have a header of this length.
    """
    refuse_pointer(start, name)
    if file_bytes < 8 or len(start) < 8:
        raise FormatError(f"{name}: {file_bytes} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", start[:8])
    if length > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise FormatError(
            f"{name}: not a safetensors file, or damaged: its header would have {length:,} bytes, "
            f"the file has {file_bytes - 8:,} after the length (and {MAX_HEADER_BYTES:,} are the "
            f"most allowed); get it again"
        )
    return int(length)


def parse_header(text: bytes, path: Path, file_bytes: int) -> dict[str, StoredTensor]:
    """Parse and check the header of a safetensors file, which may be on another machine.

    Args:
        text: The JSON text, as long as `header_length` says.
        path: The file that the tensors are in. It is not read.
        file_bytes: Size of the file.

    Returns:
        Tensors by name, in the order of their data.

    Raises:
        FormatError: As in `read_header`.
    """
    entries, _ = _parse(text, path.name)
    return _checked_tensors(
        path, entries, data_start=8 + len(text), data_bytes=file_bytes - 8 - len(text)
    )


def header_metadata(text: bytes, name: str) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file, which describes the whole file.

    Args:
        text: The JSON text, as long as `header_length` says.
        name: Name of the file, for messages.

    Returns:
        Texts by key, empty if the header has no metadata.

    Raises:
        FormatError: If the header is not valid JSON, or its metadata does not consist of texts.
    """
    return _parse(text, name)[1]


def _parse(text: bytes, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the entries of a header by tensor, and its metadata."""
    entries = load_json(text, name)
    if not isinstance(entries, dict):
        raise FormatError(f"{name}: the header must be a JSON object, found another value")
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{name}: {_METADATA} must map names to strings")
    return entries, metadata


def build_header(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Lay tensors out as the safetensors library does: widest dtype first, then by name.

    The result depends only on the set of tensors, not on their order.

    Args:
        specs: The tensors.
        metadata: Texts by key that describe the file. None: the framework alone.

    Returns:
        The header (with its length in front, padded with spaces to 8 bytes), and the offset of
        every tensor from the start of the file.
    """
    ordered = sorted(specs, key=lambda spec: (-ITEM_BYTES[spec.dtype], spec.dtype, spec.name))
    document: dict[str, Any] = {_METADATA: {"format": "pt"} | dict(metadata or {})}
    position = 0
    for spec in ordered:
        document[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    offsets = {spec.name: len(header) + document[spec.name]["data_offsets"][0] for spec in ordered}
    return header, offsets


def _checked_tensors(
    path: Path, entries: dict[str, Any], *, data_start: int, data_bytes: int
) -> dict[str, StoredTensor]:
    problems: list[str] = []
    ranges: list[tuple[int, int, StoredTensor]] = []
    for name, entry in entries.items():
        try:
            begin, end, tensor = _checked_entry(path, name, entry, data_start)
        except FormatError as error:
            problems += error.problems
        else:
            ranges.append((begin, end, tensor))
    ranges.sort(key=lambda item: item[:2])
    position = 0
    for begin, end, tensor in ranges:
        if not problems and begin != position:
            problems.append(
                f"{path.name}: tensor {shown(tensor.name)} begins at byte {begin} of the data, "
                f"expected {position} (no holes, no overlaps)"
            )
        position = end
    if not problems and position != data_bytes:
        problems.append(
            f"{path.name}: the tensors need {position} bytes, the file holds {data_bytes} "
            f"(truncated or overlong)"
        )
    if problems:
        raise FormatError(problems)
    return {tensor.name: tensor for _, _, tensor in ranges}


def _checked_entry(
    path: Path, name: str, entry: Any, data_start: int
) -> tuple[int, int, StoredTensor]:
    where = f"{path.name}: tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise FormatError(
            f"{where} has dtype {shown(dtype)}, expected one of {', '.join(ITEM_BYTES)}"
        )
    if not _is_sizes(shape):
        raise FormatError(f"{where} has shape {shown(shape)}, expected a list of sizes")
    if not (_is_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise FormatError(f"{where} has data_offsets {shown(offsets)}, expected [begin, end]")
    if len(shape) > MAX_DIMENSIONS:
        raise FormatError(f"{where} has {len(shape)} dimensions, at most {MAX_DIMENSIONS} are read")
    if not all(product < SIZE_LIMIT for product in accumulate(shape, mul)):
        raise FormatError(f"{where} has a shape of 2^63 elements or more")
    begin, end = offsets
    tensor = StoredTensor(name, dtype, tuple(shape), path, data_start + begin)
    if tensor.nbytes != end - begin:
        raise FormatError(
            f"{where} of dtype {dtype} and shape {shown(shape)} needs {tensor.nbytes} bytes, "
            f"its data_offsets span {end - begin}"
        )
    return begin, end, tensor


def _is_sizes(value: Any) -> bool:
    """Return whether `value` is a list of non-negative integers (True and False are not)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
