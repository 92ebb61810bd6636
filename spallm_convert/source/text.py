"""Text to calibrate or to measure with, read from where the user has it.

A source is `builtin`, a file (plain text, or JSON records), or a dataset on the Hub.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spallm_convert.errors import SourceError, SpallmError, one_line
from spallm_convert.paths import user_path

BUILTIN = "builtin"
ACCEPTED = f"{BUILTIN!r}, a text, .json or .jsonl file, or a dataset ORG/NAME[[:CONFIG]:SPLIT]"

_LINES_SUFFIXES = (".jsonl", ".jsonlines", ".ndjson")
_JSON_SUFFIXES = (".json", *_LINES_SUFFIXES)
_DATASET = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(:[^:/]+){0,2}")
_RECORD_KEYS = "'text', 'messages' or 'instruction' (with 'input' and 'output')"

#: Of records that come one by one this much is read: some 16 M tokens, sixty times a usual
#: calibration set.
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
    elif _DATASET.fullmatch(source) and path.suffix not in {".txt", *_JSON_SUFFIXES}:
        documents = _read_dataset(source)
    else:
        raise SourceError(f"text {source!r}: no such file; accepted are {ACCEPTED}")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise SourceError(f"text {source!r}: there is no text in it")
    return documents


def english_text() -> str:
    """English prose that every Python has: the topics of its documentation."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _read_file(path: Path) -> list[str]:
    suffix = path.suffix.lower()
    if suffix in _LINES_SUFFIXES:
        return _first_documents(_lines(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 (byte {error.start})") from error
    if suffix not in _JSON_SUFFIXES:
        return [text]
    records = _parse(text, str(path))
    if not isinstance(records, list):
        raise SourceError(f"{path}: holds {_kind(records)}, expected a list of records")
    return [_document(record, f"{path}, record {i}") for i, record in enumerate(records)]


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a file of lines, and where each is."""
    with path.open("rb") as file:
        for i, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {i}"
                yield where, _parse(line, where)


def _parse(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not JSON ({error})") from error


def _document(record: Any, where: str) -> str:
    """The text of a record."""
    if not isinstance(record, dict):
        raise SourceError(f"{where}: {_kind(record)}, expected an object with {_RECORD_KEYS}")
    if "text" in record:
        parts = [record["text"]]
    elif "messages" in record:
        parts = list(_contents(record["messages"], where))
    elif "instruction" in record:
        parts = [record.get(key) for key in ("instruction", "input", "output")]
    else:
        found = ", ".join(map(repr, record)) or "none"
        raise SourceError(f"{where}: found the keys {found}, expected {_RECORD_KEYS}")
    for part in parts:
        if not isinstance(part, str | None):
            raise SourceError(f"{where}: {_kind(part)} where text is expected")
    joined = "\n\n".join(part for part in parts if part)
    # JSON can spell half a surrogate pair, which no tokenizer takes.
    return joined.encode("utf-8", "replace").decode()


def _contents(messages: Any, where: str) -> Iterator[Any]:
    """What is said in a chat: the contents of its messages, or the texts that they are lists of."""
    for message in messages if isinstance(messages, list) else [messages]:
        if not isinstance(message, dict) or "content" not in message:
            raise SourceError(f"{where}: 'messages' must be a list of objects with 'content'")
        content = message["content"]
        if isinstance(content, list):
            yield from (part.get("text") for part in content if isinstance(part, dict))
        else:
            yield content


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"


def _read_dataset(source: str) -> list[str]:
    """The first documents of a split of a dataset on the Hub, streamed."""
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
        return _first_documents(
            (f"{source}, record {i}", record) for i, record in enumerate(records)
        )
    except SpallmError:
        raise
    except Exception as error:  # its errors are many, from missing names to failed connections
        reason = one_line(error)
        raise SourceError(
            f"text {source!r}: no such file, and no dataset either ({reason})"
        ) from error


def _first_documents(records: Iterable[tuple[str, Any]]) -> list[str]:
    """The texts of records, each with where it is, until there are characters enough."""
    documents: list[str] = []
    characters = 0
    for where, record in records:
        documents.append(_document(record, where))
        characters += len(documents[-1])
        if characters >= _MOST_CHARACTERS:
            break
    return documents
