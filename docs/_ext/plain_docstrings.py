"""Turn this project's docstrings, which are plain text in Google style, into reStructuredText.

The sections `Args:`, `Attributes:`, `Returns:`, `Yields:` and `Raises:` become lists of fields.

Elsewhere, a docstring may name a parameter at the start of a line or a clause: `weights: float32
[rows, n]`. Every parameter then starts a new line, and so does a sentence that begins with
"Raises". Text between backticks is code. Nothing else is markup: characters that reStructuredText
would read as markup are escaped.

Signatures are shown as they are written in the source: `Singles`, not NumPy's type for the alias.
"""

import dataclasses
import inspect
import re
import textwrap
from typing import Any

from sphinx.application import Sphinx

_CODE = re.compile(r"(`[^`]+`)")
_MARKUP = re.compile(r"([\\*|_<>])")
_ENTRY = re.compile(r"(\*{0,2}[\w.]+(?:, [\w.]+)*): +(.*)", re.DOTALL)
#: Section -> the field of its entries in reStructuredText.
_SECTIONS = {
    "Args:": "param",
    "Attributes:": "ivar",
    "Raises:": "raises",
    "Returns:": "returns",
    "Yields:": "yields",
}
#: Fields with a name; the others are one text.
_NAMED = {"param", "ivar", "raises"}


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _rewrite)
    app.connect("autodoc-process-signature", _as_written)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _rewrite(
    app: Sphinx, what: str, name: str, documented: Any, options: Any, lines: list[str]
) -> None:
    paragraphs = "\n".join(lines).strip().split("\n\n")
    names = _names(documented)
    rewritten: list[str] = []
    for text in paragraphs:
        header, _, body = text.partition("\n")
        field = _SECTIONS.get(header.strip())
        rewritten += [*(_fields(field, body) if field else _lines(text, names)), ""]
    lines[:] = rewritten


def _fields(field: str, body: str) -> list[str]:
    """Return the entries of a section as fields. A line that is indented more continues one."""
    body = textwrap.dedent(body)
    if field not in _NAMED:
        return [f":{field}: {_inline(' '.join(body.split()))}"]
    fields = []
    for entry in re.split(r"\n(?! )", body):
        found = _ENTRY.match(" ".join(entry.split()))
        if found is None:
            raise ValueError(f"expected `name: text` in a docstring, found {entry!r}")
        fields += [
            f":{field} {_escaped(name)}: {_inline(found[2])}" for name in found[1].split(", ")
        ]
    return fields


def _as_written(
    app: Sphinx, what: str, name: str, documented: Any, options: Any, arguments: str, returned: str
) -> tuple[str, str | None] | None:
    if what not in {"function", "method", "class"}:
        return None
    if getattr(documented, "_is_protocol", False):  # nobody makes an instance of a protocol
        return "", None
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
