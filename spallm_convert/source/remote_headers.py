"""Read the header of a safetensors file on the Hub without downloading its data.

The checks are the ones that a file on this machine gets. huggingface_hub can read such headers too,
but it trusts the shapes, dtypes and offsets in them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_session, hf_hub_url
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
)

from spallm_convert.errors import FormatError, SourceError
from spallm_convert.hub_errors import clear_errors
from spallm_convert.hub_retries import retried
from spallm_formats import StoredTensor
from spallm_formats.header import header_length, parse_header

#: Bytes of the first request. The headers of most files are shorter.
_FIRST_BYTES = 100_000
_TIMEOUT = 60.0  # seconds without a byte
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})")


@dataclass(frozen=True)
class _Part:
    """Hold the first bytes that were asked for, or fewer if the file ends, and the file's size."""

    data: bytes
    file_bytes: int


def read_remote_header(
    repo_id: str, name: str, commit: str, folder: Path
) -> dict[str, StoredTensor]:
    """Read which tensors a safetensors file on the Hub holds.

    Args:
        repo_id: Id on the Hub.
        name: Name of the file.
        commit: Commit of the repository.
        folder: Folder in the cache. The tensors name a file in it that is not there.

    Returns:
        Tensors by name, in the order of their data.

    Raises:
        SourceError: If the Hub refuses or cannot be reached, or the header breaks the format.
    """
    url = hf_hub_url(repo_id, name, revision=commit)

    def ask(start: int, stop: int) -> _Part:
        return retried(f"{repo_id}: {name}", lambda: _request(url, start, stop))

    with clear_errors(repo_id, SourceError, name):
        try:
            part = ask(0, _FIRST_BYTES)
            length = header_length(part.data, name, part.file_bytes)
            text = part.data[8 : 8 + length]
            if len(text) < length:
                text += ask(8 + len(text), 8 + length).data
            if len(text) != length:
                raise ValueError(f"{len(text):,} of {length:,} bytes of the header")
            return parse_header(text, folder / name, part.file_bytes)
        except FormatError as error:
            raise SourceError(f"{repo_id}: {error}") from error


def _request(url: str, start: int, stop: int) -> _Part:
    """Ask for bytes [start, stop) of a file.

    The client removes the token when an answer leads to another host.
    """
    headers = build_hf_headers() | {
        "Range": f"bytes={start}-{stop - 1}",
        "Accept-Encoding": "identity",
    }
    with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT) as response:
        size = _size_of_empty(response)
        if size is not None:
            return _Part(b"", size)
        hf_raise_for_status(response)
        first, size = _place(response)
        if first not in {0, start}:
            raise ValueError(f"bytes from {first:,}, expected bytes from {start:,}")
        skip = start - first
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= skip + stop - start:  # a server without ranges sends the whole file
                break
    return _Part(bytes(data[skip : skip + stop - start]), size)


def _size_of_empty(response: Any) -> int | None:
    """Return the size of the file if it ends before the range; None for other answers."""
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return int(found[3]) if response.status_code == 416 and found else None


def _place(response: Any) -> tuple[int, int]:
    """Return the place of an answer's first byte in the file, and the size of the file."""
    if response.status_code == 206:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if found is None or found[1] is None:
            raise ValueError("no Content-Range in a part of a file")
        return int(found[1]), int(found[3])
    size = response.headers.get("Content-Length", "")
    if not re.fullmatch(r"\d{1,18}", size):
        raise ValueError("no Content-Length, so the size of the file is not known")
    return 0, int(size)
