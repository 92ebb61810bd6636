"""Find the Python code of a model, and the files that it names, without running any of it.

transformers loads the classes that `auto_map` names, from files in the model's folder, and the
files that these import by `from .name import`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spallm_formats import CONFIG_FILE, FormatError, open_regular, read_json

#: Configs in which transformers looks for `auto_map`.
_CONFIGS = (
    CONFIG_FILE,
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_CODE_BYTES = 1 << 22
_MOST_FILES = 256

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_IMPORT = re.compile(r"^[ \t]*from[ \t]+\.(\w+)[ \t]+import\b", re.MULTILINE)
_QUOTED = re.compile(r"""["'](?:\./)?([\w.-]{1,200}\.[a-z]{1,10})["']""")


def code_files(folder: Path) -> tuple[set[str], set[str]]:
    """List the Python files that transformers would load from a folder, and the names they quote.

    Args:
        folder: Folder of the model.

    Returns:
        Names of the Python files, whether or not they exist, and everything between quotes in them
        that may be a file's name.
    """
    found: set[str] = set()
    quoted: set[str] = set()
    waiting = sorted(_mapped(folder))
    while waiting and len(found) < _MOST_FILES:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        text = _code(folder / name)
        quoted.update(_QUOTED.findall(text))
        waiting += {f"{module}.py" for module in _IMPORT.findall(text)}
    return found, quoted


def _mapped(folder: Path) -> set[str]:
    """Return the names of the files in the `auto_map` of the folder's configs."""
    configs = (_json_object(folder / name) for name in _CONFIGS)
    references = (text for config in configs for text in _texts(config.get("auto_map")))
    # "ORG/NAME--FILE.CLASS" is code of another repository.
    modules = {text.rpartition(".")[0] for text in references if "--" not in text}
    return {f"{module}.py" for module in modules if _PLAIN.fullmatch(module)}


def _texts(auto_map: Any) -> Iterator[str]:
    """Yield the references of an `auto_map`: its values are texts, or lists of texts and null."""
    for value in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
        parts = value if isinstance(value, list) else [value]
        yield from (part for part in parts if isinstance(part, str))


def _json_object(path: Path) -> dict[str, Any]:
    """Return a JSON object in a file, empty if there is none: whoever uses the file says so."""
    try:
        document = read_json(path)
    except (FormatError, OSError):
        return {}
    return document if isinstance(document, dict) else {}


def _code(path: Path) -> str:
    """Return the text of a Python file, at most its first 4 MiB; empty if it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(_CODE_BYTES).decode("utf-8", "replace")
    except (FormatError, OSError):
        return ""
