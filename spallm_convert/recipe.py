"""`Recipe`: bits and groups for the layers that match a pattern, or the wish to keep them dense."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spallm_formats import FormatError, load_json, read_small, shown, summary

from .errors import OptionError, one_line
from .paths import user_path

BITS = (2, 3, 4)
AUTO = "auto"

_KEYS = ("bits", "groups", "dense")
#: The largest recipe that is read. One with an entry for each of 5,000 layers has 0.4 MB.
_MOST_BYTES = 1 << 20
_EXAMPLE = "an entry is a pattern with bits, groups or dense, such as '*.down_proj' with bits 3"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Say how to sketch the layers whose name matches a pattern.

    Args:
        pattern: Shell pattern of names in the model or in the checkpoint, as for `ignore`.
        bits: 2, 3 or 4 bits per code. None: the bits of the conversion.
        groups: Tables per row, or "auto". None: the groups of the conversion.
        dense: Leave these layers dense. Then neither bits nor groups can be given.

    Raises:
        OptionError: Names every value that is not accepted.
    """

    pattern: str
    bits: int | None = None
    groups: int | str | None = None
    dense: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.pattern, str) or not self.pattern:
            problems.append(f"a pattern must be a text, found {self.pattern!r}")
        if self.bits is not None:
            problems += bits_problems("bits", self.bits)
        if self.groups is not None:
            problems += groups_problems("groups", self.groups)
        if type(self.dense) is not bool:
            problems.append(f"dense must be true or false, found {self.dense!r}")
        elif self.dense and self.chooses:
            problems.append("dense layers have no bits or groups: leave these out, or dense")
        if problems:
            name = shown(self.pattern) if isinstance(self.pattern, str) else "?"
            raise OptionError(f"recipe, entry {name}: {'; '.join(problems)}")

    @property
    def chooses(self) -> bool:
        """Return whether the rule gives bits or groups."""
        return self.bits is not None or self.groups is not None

    def to_json(self) -> dict[str, Any]:
        """Return the pattern, and the keys that are given, as they stand in `conversion.json`."""
        given = {"bits": self.bits, "groups": self.groups, "dense": self.dense or None}
        return {"pattern": self.pattern} | {k: v for k, v in given.items() if v is not None}


@dataclass(frozen=True)
class Recipe:
    """Hold the rules of a conversion. The last rule that matches a layer decides, alone.

    Args:
        rules: The rules. General ones come first, exceptions after them.

    Raises:
        OptionError: If they are not rules, or a pattern occurs twice.
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if isinstance(self.rules, Iterable):
            object.__setattr__(self, "rules", tuple(self.rules))
        if not isinstance(self.rules, tuple) or not all(isinstance(r, Rule) for r in self.rules):
            raise OptionError(f"recipe: rules must be a sequence of Rule, found {self.rules!r}")
        if not self.rules:
            raise OptionError(f"recipe: it has no entries; {_EXAMPLE}")
        patterns = [rule.pattern for rule in self.rules]
        if repeated := [shown(p) for p, count in Counter(patterns).items() if count > 1]:
            raise OptionError(
                f"recipe: several entries for {summary(repeated, ', ')}: keep one of each"
            )

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe from a file.

        Args:
            path: A TOML file (`.toml`) or a JSON file (`.json`): a table or an object with a
                pattern as each key, and a table with `bits`, `groups` or `dense` as its value.

        Raises:
            OptionError: If the file is missing, too large or damaged, or has an unknown key or an
                unaccepted value.
        """
        file = user_path(path)
        kind = file.suffix.lower()
        if kind not in (".toml", ".json"):
            raise OptionError(f"recipe {path}: expected a file that ends in .toml or .json")
        try:
            data = read_small(file, _MOST_BYTES)
            document = load_json(data, file.name) if kind == ".json" else _toml(data, file.name)
        except FormatError as error:
            raise OptionError(f"recipe {path}: {error}") from error
        except OSError as error:
            raise OptionError(f"recipe {path}: cannot be read ({error.strerror})") from error
        return cls.parse(document)

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Recipe:
        """Make a recipe from a parsed file.

        Args:
            document: For each pattern, a mapping with `bits`, `groups` or `dense`.

        Raises:
            OptionError: Names every unknown key and unaccepted value.
        """
        if not isinstance(document, Mapping):
            raise OptionError(f"recipe: expected a table of patterns, found {shown(document)}")
        rules, problems = [], []
        for pattern, keys in document.items():
            try:
                rules.append(_rule(pattern, keys))
            except OptionError as error:
                problems.append(str(error))
        if problems:
            raise OptionError(summary(problems))
        return cls(tuple(rules))

    def to_json(self) -> list[dict[str, Any]]:
        """Return the rules in order, as they stand in `conversion.json`."""
        return [rule.to_json() for rule in self.rules]


def bits_problems(name: str, value: Any) -> list[str]:
    """Return what is wrong with bits per code, given the option's name."""
    if type(value) is int and value in BITS:
        return []
    return [f"{name} must be 2, 3 or 4, found {value!r}"]


def groups_problems(name: str, value: Any) -> list[str]:
    """Return what is wrong with groups per row, given the option's name."""
    if value == AUTO or (type(value) is int and value >= 1):
        return []
    return [f"{name} must be 'auto' or at least 1, found {value!r}"]


def _rule(pattern: Any, keys: Any) -> Rule:
    where = f"recipe, entry {shown(str(pattern))}"
    if not isinstance(keys, Mapping):
        raise OptionError(f"{where}: found {shown(keys)}; {_EXAMPLE}")
    if unknown := sorted(set(map(str, keys)) - set(_KEYS)):
        nested = any(isinstance(value, Mapping) for value in keys.values())
        quotes = ': write the pattern in quotes, as in ["*.down_proj"]' if nested else ""
        named = summary([shown(key) for key in unknown], ", ")
        raise OptionError(f"{where}: unknown key {named}, accepted are {', '.join(_KEYS)}{quotes}")
    if not keys:
        raise OptionError(f"{where}: it says nothing; {_EXAMPLE}")
    return Rule(pattern=pattern, **keys)


def _toml(data: bytes, name: str) -> Any:
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: not valid TOML ({one_line(error)})") from error
