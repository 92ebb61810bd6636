"""Read text for calibration and evaluation.

A source of text is `builtin`, a file (plain text or JSON records), or a dataset on the Hub.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from spallm_convert.errors import SourceError, SpallmError, one_line
from spallm_convert.paths import user_path
from spallm_convert.progress import Progress

from .records import (
    JSON_SUFFIXES,
    Record,
    json_records,
    kind_of,
    numbered,
    unsuitable,
)
from .text_blocks import text_blocks

BUILTIN = "builtin"
ACCEPTED = f"{BUILTIN!r}, a text, .json or .jsonl file, or a dataset ORG/NAME[[:CONFIG]:SPLIT]"

_DATASET = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(:[^:/]+){0,2}")
#: Keys of a message that calls tools, which may have no content.
_CALLS = {"tool_calls", "function_call"}
_RECORD_KEYS = "'text', 'messages' or 'instruction' (with 'input' and 'output')"

#: Characters that are read of a source: about 16 M tokens, 60 times a usual calibration set.
_MOST_CHARACTERS = 1 << 26
#: A text that is longer is cut at the last space or end of a line among this many characters.
_LONGEST_WORD = 1 << 16


class _Text(NamedTuple):
    """The documents of a source, and whether reading stopped before its end."""

    documents: list[str]
    is_cut: bool


def read_documents(source: str, progress: Progress | None = None) -> list[str]:
    """Read the documents of a source of text, up to 64 Mi characters.

    A record of a JSON file or of a dataset is one document: its `text`, the contents of its
    `messages`, or its `instruction`, `input` and `output`, joined by blank lines. Reading stops at
    the end of the document with the last character. A longer text file is cut between two words.

    Args:
        source: "builtin" (the English documentation that every Python has, one document), the path
            of a text file in UTF-8 (one document), of a `.jsonl`, `.jsonlines` or `.ndjson` file,
            or of a `.json` file with a list of records, or a dataset on the Hub, as
            "ORG/NAME[[:CONFIG]:SPLIT]". The split is "train" unless given. A dataset needs the
            package `datasets`.
        progress: Listener that is told if not all of the text is read. None: nothing is reported.

    Returns:
        The documents that are not empty, at least one.

    Raises:
        SourceError: If there is no such source, it cannot be read, or it has no text.
    """
    path = user_path(source)
    if source == BUILTIN:
        text = _Text([english_text()], is_cut=False)
    elif path.is_file() or path.is_fifo():
        text = _read_file(path)
    elif path.is_dir():
        raise SourceError(f"text {source!r}: a folder; accepted are {ACCEPTED}")
    elif _DATASET.fullmatch(source) and path.suffix not in {".txt", *JSON_SUFFIXES}:
        text = _read_dataset(source)
    else:
        raise SourceError(f"text {source!r}: no such file; accepted are {ACCEPTED}")
    documents = [document for document in text.documents if document.strip()]
    if not documents:
        raise SourceError(f"text {source!r}: there is no text in it")
    if text.is_cut and progress is not None:
        count = sum(map(len, documents))
        progress.remark(f"text {source!r}: only its first {count:,} characters are used")
    return documents


def english_text() -> str:
    """Return English prose that comes with every Python: the topics of its documentation."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def english_topics() -> list[tuple[str, str]]:
    """Return the topics of `english_text`, each as its title and its text."""
    from pydoc_data.topics import topics

    parts = (topics[name].strip().partition("\n") for name in sorted(topics))
    return [(title.strip(), body.strip()) for title, _, body in parts]


def _read_file(path: Path) -> _Text:
    if path.suffix.lower() in JSON_SUFFIXES:
        return _first_documents(json_records(path))
    return _first_characters(text_blocks(path, "text"))


def _first_characters(blocks: Iterator[str]) -> _Text:
    """Return the first `_MOST_CHARACTERS` of a text, without the word that they end in."""
    parts: list[str] = []
    characters = 0
    for block in blocks:
        parts.append(block)
        characters += len(block)
        if characters > _MOST_CHARACTERS:
            break
    text = "".join(parts)
    if characters <= _MOST_CHARACTERS:
        return _Text([text], is_cut=False)
    first = max(0, _MOST_CHARACTERS - _LONGEST_WORD)
    end = max(text.rfind(white, first, _MOST_CHARACTERS + 1) for white in " \n")
    return _Text([text[: end if end > 0 else _MOST_CHARACTERS]], is_cut=True)


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
        if isinstance(message, dict) and message.keys() & _CALLS and not message.get("content"):
            continue
        if not isinstance(message, dict) or "content" not in message:
            raise SourceError(f"{where}: 'messages' must be a list of objects with 'content'")
        content = message["content"]
        if isinstance(content, list):
            yield from (part.get("text") for part in content if isinstance(part, dict))
        else:
            yield content


def _read_dataset(source: str) -> _Text:
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


def _first_documents(records: Iterable[Record]) -> _Text:
    """Return the texts of the first records, at least `_MOST_CHARACTERS` if there are as many."""
    documents: list[str] = []
    characters = 0
    for record in records:
        documents.append(_document(record))
        characters += len(documents[-1])
        if characters >= _MOST_CHARACTERS:
            return _Text(documents, is_cut=True)
    return _Text(documents, is_cut=False)
