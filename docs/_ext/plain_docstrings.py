"""Turns this project's docstrings, which are plain text, into reStructuredText.

A docstring names a parameter at the start of a line or a clause: `weights: float32 [rows, n]`. Each
such name starts a new line here, and so does a sentence that begins with "Raises". Text between
backticks is code. Nothing else is markup: characters that reStructuredText would read as such are
escaped.
"""

import dataclasses
import inspect
import re
from typing import Any

from sphinx.application import Sphinx

_CODE = re.compile(r"(`[^`]+`)")
_MARKUP = re.compile(r"([\\*|_<>])")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _rewrite)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _rewrite(
    app: Sphinx, what: str, name: str, documented: Any, options: Any, lines: list[str]
) -> None:
    paragraphs = "\n".join(lines).strip().split("\n\n")
    names = _names(documented)
    lines[:] = [line for text in paragraphs for line in (*_lines(text, names), "")]


def _names(documented: Any) -> list[str]:
    """Names of parameters and fields, the longest first."""
    fields = [f.name for f in dataclasses.fields(documented)] if _is_data(documented) else []
    annotated = list(getattr(documented, "__annotations__", {})) if _is_class(documented) else []
    try:
        parameters = list(inspect.signature(documented).parameters)
    except (TypeError, ValueError):
        parameters = []
    others = ["weight", "weight_table", "optimizer_bytes", "gradient_bytes"]
    return sorted({*fields, *annotated, *parameters, *others}, key=len, reverse=True)


def _is_class(documented: Any) -> bool:
    return inspect.isclass(documented)


def _is_data(documented: Any) -> bool:
    return _is_class(documented) and dataclasses.is_dataclass(documented)


def _lines(text: str, names: list[str]) -> list[str]:
    """A paragraph, or a line block where parameters are named in it."""
    joined = " ".join(text.split())
    name = "|".join(map(re.escape, names))
    start = re.compile(rf"(?:^|(?<=[.;] ))((?:{name})(?:(?:, | and )(?:{name}))*): ")
    pieces = start.split(joined)
    found = [pieces[0]] if pieces[0] else []
    found += [
        f"**{_escaped(named)}**: {_inline(said)}"
        for named, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if pieces[0]:
        found[0] = _inline(pieces[0])
    split = [part for line in found for part in re.split(r"(?<=\.) (?=Raises [A-Z])", line)]
    if len(split) == 1:
        return split
    return [f"| {line.strip()}" for line in split]


def _inline(text: str) -> str:
    parts = _CODE.split(text)
    return "".join(f"`{part}`" if _CODE.fullmatch(part) else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    return _MARKUP.sub(r"\\\1", text)
