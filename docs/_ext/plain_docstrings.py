"""Turns this project's docstrings, which are plain text, into reStructuredText.

Sections such as "Args:" are given to `sphinx.ext.napoleon`. In a docstring without sections, a
parameter is named at the start of a line or a clause: `weights: float32 [rows, n]`. Each such name
starts a new line here, and so does a sentence that begins with "Raises". Text between backticks is
code. Nothing else is markup: characters that reStructuredText would read as such are escaped.

Signatures are shown as they are written: `Singles`, not what NumPy makes of the alias.
"""

import dataclasses
import inspect
import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

_CODE = re.compile(r"(`[^`]+`)")
_MARKUP = re.compile(r"([\\*|]|_(?!\w))")
_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):$", re.MULTILINE)
#: Fields of a class are no entries of their own, and the signature has their types.
_SECTIONS = Config(
    napoleon_use_ivar=True, napoleon_use_rtype=False, napoleon_attr_annotations=False
)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _rewrite)
    app.connect("autodoc-process-signature", _as_written)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _rewrite(
    app: Sphinx, what: str, name: str, documented: Any, options: Any, lines: list[str]
) -> None:
    if what == "data":  # what `dict` says of itself
        lines.clear()
        return
    text = "\n".join(lines).strip()
    if _SECTION.search(text):
        lines[:] = GoogleDocstring(_inline(text), _SECTIONS, what=what).lines()
        return
    paragraphs = text.split("\n\n")
    names = _names(documented)
    lines[:] = [line for text in paragraphs for line in (*_lines(text, names), "")]


def _as_written(
    app: Sphinx, what: str, name: str, documented: Any, options: Any, arguments: str, returned: str
) -> tuple[str, str | None] | None:
    if what not in {"function", "method", "class"}:
        return None
    signature = inspect.signature(documented)
    parameters = [
        parameter.replace(annotation=_Written(parameter.annotation))
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    shown = signature.replace(parameters=parameters, return_annotation=signature.empty)
    result = None if what == "class" else str(_Written(signature.return_annotation))
    return str(shown), result


class _Written:
    """An annotation that prints as it stands in the source."""

    __module__ = "builtins"  # so that `inspect` prints no module before it

    def __init__(self, annotation: Any) -> None:
        self._text = getattr(annotation, "__forward_arg__", annotation)

    def __repr__(self) -> str:
        return str(self._text)


def _names(documented: Any) -> list[str]:
    """Names of parameters and fields, the longest first."""
    fields = [f.name for f in dataclasses.fields(documented)] if _is_data(documented) else []
    annotated = list(inspect.get_annotations(documented)) if _is_class(documented) else []
    try:
        parameters = list(inspect.signature(documented).parameters)
    except (TypeError, ValueError):
        parameters = []
    return sorted({*fields, *annotated, *parameters}, key=len, reverse=True)


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
    found = [_inline(pieces[0])] if pieces[0] else []
    found += [
        f"**{_escaped(named)}**: {_inline(said)}"
        for named, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    split = [part for line in found for part in re.split(r"(?<=\.) (?=Raises [A-Z])", line)]
    if len(split) == 1:
        return split
    return [f"| {line.strip()}" for line in split]


def _inline(text: str) -> str:
    parts = _CODE.split(text)
    return "".join(f"`{part}`" if _CODE.fullmatch(part) else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    return _MARKUP.sub(r"\\\1", text)
