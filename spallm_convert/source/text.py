"""Read text for calibration and evaluation.

A source of text is `builtin`, a file (plain text or JSON records), or a dataset on the Hub.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spallm_convert.errors import SourceError, SpallmError, one_line
from spallm_convert.paths import user_path

from .records import (
    JSON_SUFFIXES,
    LINES_SUFFIXES,
    Record,
    json_records,
    kind_of,
    numbered,
    unsuitable,
)

BUILTIN = "builtin"
ACCEPTED = f"{BUILTIN!r}, a text, .json or .jsonl file, or a dataset ORG/NAME[[:CONFIG]:SPLIT]"

_DATASET = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(:[^:/]+){0,2}")
_RECORD_KEYS = "'text', 'messages' or 'instruction' (with 'input' and 'output')"

#: Records are read one by one until there are this many characters: about 16 M tokens, 60 times
#: a usual calibration set.
_MOST_CHARACTERS = 1 << 26


def read_documents(source: str) -> list[str]:
    """Read the documents of a source of text.

    A record of a JSON file or of a dataset is one document: its `text`, the contents of its
    `messages`, or its `instruction`, `input` and `output`, joined by blank lines. Of a `.jsonl`
    file and of a dataset, the first 64 Mi characters are read.

    Args:
        source: "builtin" (the English documentation that every Python has, one document), the path
            of a text file in UTF-8 (one document), of a `.jsonl`, `.jsonlines` or `.ndjson` file,
            or of a `.json` file with a list of records, or a dataset on the Hub, as
            "ORG/NAME[[:CONFIG]:SPLIT]". The split is "train" unless given. A dataset needs the
            package `datasets`.

    Returns:
        The documents that are not empty, at least one.

    Raises:
        SourceError: If there is no such source, it cannot be read, or it has no text.
    """
    path = user_path(source)
    if source == BUILTIN:
        documents = [english_text()]
    elif path.is_file():
        documents = _read_file(path)
    elif path.is_dir():
        raise SourceError(f"text {source!r}: a folder; accepted are {ACCEPTED}")
    elif _DATASET.fullmatch(source) and path.suffix not in {".txt", *JSON_SUFFIXES}:
        documents = _read_dataset(source)
    else:
        raise SourceError(f"text {source!r}: no such file; accepted are {ACCEPTED}")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise SourceError(f"text {source!r}: there is no text in it")
    return documents


def english_text() -> str:
    """Return English prose that comes with every Python: the topics of its documentation."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _read_file(path: Path) -> list[str]:
    suffix = path.suffix.lower()
    if suffix in LINES_SUFFIXES:
        return _first_documents(json_records(path))
    if suffix in JSON_SUFFIXES:
        return [_document(record) for record in json_records(path)]
    try:
        return [path.read_text(encoding="utf-8-sig")]
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path}: not UTF-8 (byte {error.start}); save the text in UTF-8"
        ) from error


def _document(record: Record) -> str:
    """Return the text of a record."""
    where, value = record
    if not isinstance(value, dict):
        raise unsuitable(record, _RECORD_KEYS)
    if "text" in value:
        parts = [value["text"]]
    elif "messages" in value:
        parts = list(_contents(value["messages"], where))
    elif "instruction" in value:
        parts = [value.get(key) for key in ("instruction", "input", "output")]
    else:
        raise unsuitable(record, _RECORD_KEYS)
    for part in parts:
        if not isinstance(part, str | None):
            raise SourceError(f"{where}: found {kind_of(part)}, expected text")
    joined = "\n\n".join(part for part in parts if part)
    # JSON can spell half of a surrogate pair, which tokenizers refuse.
    return joined.encode("utf-8", "replace").decode()


def _contents(messages: Any, where: str) -> Iterator[Any]:
    """Yield the contents of the messages of a chat, or the texts if contents are lists."""
    for message in messages if isinstance(messages, list) else [messages]:
        if not isinstance(message, dict) or "content" not in message:
            raise SourceError(f"{where}: 'messages' must be a list of objects with 'content'")
        content = message["content"]
        if isinstance(content, list):
            yield from (part.get("text") for part in content if isinstance(part, dict))
        else:
            yield content


def _read_dataset(source: str) -> list[str]:
    """Stream the first documents of a split of a dataset on the Hub."""
    name, *parts = source.split(":")
    split = parts.pop() if parts else "train"
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise SourceError(
            f"text {source!r}: no such file, and reading a dataset of the Hub needs the package "
            f"'datasets': pip install 'spallm-convert[datasets]'"
        ) from error
    try:
        records = datasets.load_dataset(name, *parts, split=split, streaming=True)
        return _first_documents(numbered(source, records))
    except SpallmError:
        raise
    except Exception as error:  # datasets raises many kinds, from wrong names to lost connections
        reason = one_line(error)
        raise SourceError(
            f"text {source!r}: no such file, and no dataset either ({reason}); check the name"
        ) from error


def _first_documents(records: Iterable[Record]) -> list[str]:
    """Return the texts of the first records, at least `_MOST_CHARACTERS` if there are as many."""
    documents: list[str] = []
    characters = 0
    for record in records:
        documents.append(_document(record))
        characters += len(documents[-1])
        if characters >= _MOST_CHARACTERS:
            break
    return documents
