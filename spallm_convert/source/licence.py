"""Read what a model card declares about the licence, whatever else is in the card.

The metadata of a card is YAML. It can describe values that JSON cannot hold, values far larger than
the card, and values that take minutes to parse. So only the lines of the wanted entries are parsed,
as a stream of events: texts and lists of texts are taken, and references are not followed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from .extra_files import leads_inside

#: Metadata with results of benchmarks can be this long.
_CARD_BYTES = 1 << 20
_ENTRY_CHARACTERS = 1 << 12
_MOST_CHARACTERS = 500
_MOST_VALUES = 20
_FRONT_MATTER = re.compile(r"\s*---\n(.*?)\n---[ \t]*(\n|$)", re.DOTALL)
#: An entry at the top level: its key, and all lines up to the next key.
_ENTRY = re.compile(
    r"""^["']?(license|license_name|license_link)["']?[ \t]*:.*+(?:\n(?:[ \t\]#-].*+)?)*+""",
    re.MULTILINE,
)

Licence = dict[str, str | list[str]]


def read_licence(folder: Path) -> Licence | None:
    """Read the entries about the licence from the metadata of a model's card.

    Args:
        folder: Folder of the model.

    Returns:
        `license`, `license_name` and `license_link`, if they are there: texts or lists of texts.
        None if there are none. An entry that cannot be read is left out.
    """
    card = folder / "README.md"
    if not card.is_file() or not leads_inside(folder, card):
        return None
    with card.open("rb") as file:
        start = file.read(_CARD_BYTES).decode("utf-8-sig", "replace").replace("\r\n", "\n")
    metadata = _FRONT_MATTER.match(start)
    entries = {entry[1]: entry[0] for entry in _ENTRY.finditer(metadata[1])} if metadata else {}
    values = {key: _value(entry) for key, entry in entries.items()}
    return {key: value for key, value in values.items() if value} or None


def _value(entry: str) -> str | list[str] | None:
    """Return the value of an entry, None if it is neither a text nor a list of texts."""
    if len(entry) > _ENTRY_CHARACTERS:
        return None
    try:
        events = list(yaml.parse(entry, Loader=yaml.BaseLoader))
    except (ValueError, OverflowError, yaml.YAMLError):  # the first two: escapes of no character
        return None
    # Around the value: start of stream, document and mapping, the key, and three ends.
    first, *others = events[4:-3]
    if isinstance(first, yaml.ScalarEvent) and not others:
        return _text(first)
    texts = [_text(event) for event in others[:-1]]
    fitting = [text for text in texts if text]
    if isinstance(first, yaml.SequenceStartEvent) and len(fitting) == len(texts) <= _MOST_VALUES:
        return fitting
    return None


def _text(event: Any) -> str | None:
    """Return the text of a scalar; None for others, if it is too long, or if it is not Unicode."""
    text = event.value if isinstance(event, yaml.ScalarEvent) else ""
    is_unicode = not any("\ud800" <= character <= "\udfff" for character in text)
    return text if is_unicode and len(text) <= _MOST_CHARACTERS else None
