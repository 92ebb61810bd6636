"""Make text from files fit for messages: one line, of bounded length, without control characters.

Names in checkpoints and answers of servers may hold anything: escape codes that a terminal obeys,
line feeds, megabytes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

#: Longest message of an error and longest value in a message, in characters.
MAX_MESSAGE = 1900
MAX_VALUE = 120
#: How many problems an error names.
MAX_NAMED = 3
#: How many characters of a message that is cut are kept at its end, where the remedy stands.
_KEPT_END = 600
_CUT = " [...] "


def printable(text: str, *, lines: bool = False) -> str:
    """Escape every character that a terminal could obey or not show.

    Args:
        text: Any text.
        lines: Whether line feeds and tabs stay as they are.

    Returns:
        The text; control characters, invisible formatting characters and lone surrogates are
        written as Python escapes, such as `\\x1b`.
    """
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(c if _is_shown(c) or c in kept else _escaped(c) for c in text)


def message(text: str) -> str:
    """Return text on one line that can be printed, cut in the middle if it is very long."""
    line = printable(" ".join(text.split()))
    if len(line) <= MAX_MESSAGE:
        return line
    return line[: MAX_MESSAGE - _KEPT_END - len(_CUT)] + _CUT + line[-_KEPT_END:]


def shown(value: object) -> str:
    """Return the repr of a value from a file, cut if it is long."""
    # Cut a long text first: the repr of megabytes would take that memory once more.
    cut = value[: MAX_VALUE + 1] if isinstance(value, str | bytes | list | tuple) else value
    try:
        text = repr(cut)
    except (ValueError, RecursionError):  # a huge integer, or a value nested very deeply
        text = f"a value of type {type(value).__name__}"
    if len(text) > MAX_VALUE or cut != value:
        text = text[:MAX_VALUE] + "..."
    return printable(text)


def summary(problems: Sequence[str], separator: str = "; ") -> str:
    """Join the first three problems, or names, and say how many more there are.

    Args:
        problems: The problems or names.
        separator: The text between two of them.
    """
    named = separator.join(message(problem) for problem in problems[:MAX_NAMED])
    more = len(problems) - MAX_NAMED
    return f"{named}{separator}and {more} more" if more > 0 else named


def _is_shown(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
