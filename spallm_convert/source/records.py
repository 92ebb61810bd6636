"""Read records of JSON: a list in a `.json` file, or one record per line of a `.jsonl` file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from spallm_convert.errors import SourceError

LINES_SUFFIXES = (".jsonl", ".jsonlines", ".ndjson")
JSON_SUFFIXES = (".json", *LINES_SUFFIXES)


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

    Lines are parsed one by one, so a caller can stop early.

    Args:
        path: A file with one record per line if it ends in `.jsonl`, `.jsonlines` or `.ndjson`.
            Any other file holds a list of records.

    Yields:
        The records in their order. Empty lines are skipped.

    Raises:
        SourceError: If there is no such file, or it holds something else; it names the line.
    """
    if path.is_dir() or not path.exists():  # a pipe is fine
        raise SourceError(f"no such file: {path}")
    if path.suffix.lower() in LINES_SUFFIXES:
        with path.open("rb") as file:
            for i, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}, line {i}"
                    yield Record(where, _parsed(line, where, "one record per line"))
        return
    accepted = "a list of records"
    records = _parsed(path.read_bytes(), str(path), accepted)
    if not isinstance(records, list):
        raise SourceError(f"{path}: found {kind_of(records)}, expected {accepted}")
    yield from numbered(str(path), records)


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


def _parsed(data: bytes, where: str, accepted: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{where}: not UTF-8 (byte {error.start}), expected {accepted} in UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not JSON ({error}), expected {accepted}") from error
