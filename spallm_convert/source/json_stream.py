"""Parse a list of JSON values, or values one after the other, from a stream of text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from spallm_convert.errors import FormatError, SourceError
from spallm_formats import refuse_costly_json

_SPACE = re.compile(r"[ \t\n\r]*")
#: A value that is cut off fails to parse at most this far from the cut, except in a string.
_LONGEST_WORD = len("-Infinity")


class JsonStream:
    """Values of a JSON text, parsed one by one.

    Args:
        blocks: The text in blocks.
        name: Name of the text, for messages.
        most: Number of characters that a value may have.
    """

    def __init__(self, blocks: Iterator[str], name: str, *, most: int) -> None:
        self._blocks, self._name, self._most = blocks, name, most
        self._decoder = json.JSONDecoder()
        self._text, self._at = "", 0
        self._ended = False
        self._lines = 1  # the line that `_text` begins in
        self._count = 0

    def values(self) -> Iterator[Any]:
        """Parse the elements of a list, or all values if the text does not begin with a list.

        Yields:
            The values in their order.

        Raises:
            SourceError: If the text is not JSON, or a value is too long or would take much more
                memory than its size; it names the value.
        """
        is_list = self._next_character() == "["
        if not is_list:
            while self._next_character():
                yield self._value()
            return
        self._at += 1
        if self._next_character() != "]":
            yield self._value()
            while self._next_character() == ",":
                self._at += 1
                yield self._value()
        if self._next_character() != "]":
            raise self._error("Expecting ',' or ']'", self._at)
        self._at += 1
        if self._next_character():
            raise self._error("Extra data after the list", self._at)

    def _next_character(self) -> str:
        """Skip white space. Return the character after it, "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read(1)

    def _value(self) -> Any:
        """Parse the value that begins after white space, with as much text as that takes.

        The memory that it may need is only looked at when it does not end in the block that it
        begins in, because looking takes as long as parsing.
        """
        self._next_character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not self._may_be_cut(error):
                    raise self._error(error.msg, error.pos) from error
            except RecursionError as error:
                raise self._error("nested too deeply", self._at) from error
            else:
                if end < len(self._text) or self._ended:  # else a number may go on
                    self._at = end
                    self._count += 1
                    return value
            length = len(self._text) - self._at
            if length > self._most:
                raise SourceError(
                    f"{self._name}, record {self._count}: longer than {self._most:,} characters, "
                    f"expected a list of records; split the record"
                )
            self._read(min(length, self._most + 1 - length))
            try:
                refuse_costly_json(
                    self._text.encode("utf-8"), f"{self._name}, record {self._count}"
                )
            except FormatError as error:
                raise SourceError(str(error)) from error

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Return whether the error may only show that the value's end has not been read yet."""
        in_string = error.msg.startswith("Unterminated string")
        return in_string or error.pos >= len(self._text) - _LONGEST_WORD

    def _read(self, wanted: int) -> None:
        """Read at least this number of characters, if there are as many; forget what is parsed."""
        self._lines += self._text.count("\n", 0, self._at)
        parts, count = [self._text[self._at :]], 0
        while count < wanted and not self._ended:
            block = next(self._blocks, None)
            self._ended = block is None
            parts.append(block or "")
            count += len(parts[-1])
        self._text, self._at = "".join(parts), 0

    def _error(self, reason: str, position: int) -> SourceError:
        line = self._lines + self._text.count("\n", 0, position)
        return SourceError(
            f"{self._name}, record {self._count}: not JSON ({reason}, line {line}), expected a "
            f"list of records"
        )
