"""Read records of JSON: a list in a `.json` file, or one record per line of a `.jsonl` file.

Files are read as streams, so memory depends on the largest record and not on the file.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from spallm_convert.errors import FormatError, SourceError
from spallm_formats import refuse_costly_json

from .json_stream import JsonStream
from .text_blocks import text_blocks

LINES_SUFFIXES = (".jsonl", ".jsonlines", ".ndjson")
JSON_SUFFIXES = (".json", *LINES_SUFFIXES)

#: A longer record is refused: it is a whole collection on one line.
_MOST_RECORD_BYTES = 1 << 25


class Record(NamedTuple):
    """Hold a record.

    Attributes:
        where: The place it was read from, for messages, such as "train.jsonl, line 3".
        value: The parsed record, any JSON value.
    """

    where: str
    value: Any


def json_records(path: Path) -> Iterator[Record]:
    """Read the records of a file, UTF-8 with or without a byte order mark.

    Records are parsed one by one, so a caller can stop early.

    Args:
        path: A file with one record per line if it ends in `.jsonl`, `.jsonlines` or `.ndjson`.
            Any other file holds a list of records, or records one after the other.

    Yields:
        The records in their order. Empty lines are skipped.

    Raises:
        SourceError: If there is no such file, it holds something else, or a record is longer than
            32 MiB; it names the line or the record.
    """
    if path.is_dir() or not path.exists():  # a pipe is fine
        raise SourceError(f"no such file: {path}")
    if path.suffix.lower() in LINES_SUFFIXES:
        yield from _records_of_lines(path)
    else:
        accepted = "a list of records in UTF-8"
        stream = JsonStream(text_blocks(path, accepted), str(path), most=_MOST_RECORD_BYTES)
        yield from numbered(str(path), stream.values())


def numbered(source: str, values: Iterable[Any]) -> Iterator[Record]:
    """Number the records of a list or a dataset from 0, for messages."""
    return (Record(f"{source}, record {i}", value) for i, value in enumerate(values))


def objects(records: Iterable[Record], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return records that must be objects with certain keys.

    Args:
        records: The records.
        keys: Keys that each of them must have.

    Returns:
        Their values.

    Raises:
        SourceError: If a record is not an object or has no such key.
    """
    found = []
    for record in records:
        if not isinstance(record.value, dict) or not record.value.keys() >= set(keys):
            raise unsuitable(record, " and ".join(map(repr, keys)))
        found.append(record.value)
    return found


def unsuitable(record: Record, expected: str) -> SourceError:
    """Return the error for a record without the keys that a caller needs.

    Args:
        record: The record.
        expected: The keys, as the message names them.

    Returns:
        The error, not raised.
    """
    where, value = record
    if not isinstance(value, dict):
        return SourceError(f"{where}: found {kind_of(value)}, expected an object with {expected}")
    found = ", ".join(map(repr, value)) or "none"
    return SourceError(f"{where}: found the keys {found}, expected {expected}")


def kind_of(value: Any) -> str:
    """Name the type of a JSON value, for messages."""
    return f"a value of type {type(value).__name__}"


def _records_of_lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for i in itertools.count(1):
            line = file.readline(_MOST_RECORD_BYTES + 1)
            where = f"{path}, line {i}"
            if len(line) > _MOST_RECORD_BYTES:
                raise SourceError(
                    f"{where}: longer than {_MOST_RECORD_BYTES:,} bytes, expected one record per "
                    f"line; split the record, or write one record per line"
                )
            if line.strip():
                yield Record(where, _parsed(line, where))
            if not line:
                return


def _parsed(line: bytes, where: str) -> Any:
    accepted = "one record per line"
    try:
        refuse_costly_json(line, where)
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{where}: not UTF-8 (byte {error.start}), expected {accepted} in UTF-8"
        ) from error
    except FormatError as error:
        raise SourceError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not JSON ({error}), expected {accepted}") from error
