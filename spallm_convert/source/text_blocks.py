"""Decode a text file block by block, so that no more of it is read than a caller takes."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path

from spallm_convert.errors import SourceError

_BLOCK_BYTES = 1 << 20


def text_blocks(path: Path, accepted: str) -> Iterator[str]:
    """Read a text in UTF-8, with or without a byte order mark. Ends of lines become line feeds.

    Args:
        path: A file or a pipe.
        accepted: What the caller expects, for the message.

    Yields:
        The text in blocks. No character is split between two of them.

    Raises:
        SourceError: If the text is not UTF-8; it names the byte.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    before, is_first = 0, True
    with path.open("rb") as file:
        while True:
            block = file.read(_BLOCK_BYTES)
            waiting = len(decoder.getstate()[0])  # first bytes of a character of the last block
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise SourceError(
                    f"{path}: not UTF-8 (byte {before - waiting + error.start}), "
                    f"expected {accepted}; save it in UTF-8"
                ) from error
            before += len(block)
            if text:
                yield text.removeprefix("\ufeff") if is_first else text
                is_first = False
            if not block:
                return
