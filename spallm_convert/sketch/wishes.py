"""Match the patterns of layers that the user chooses: `--include`, `--ignore` and `--recipe`."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from spallm_convert.config import SketchConfig
from spallm_convert.errors import OptionError
from spallm_convert.recipe import Rule
from spallm_convert.source.skeleton import numbers_starred
from spallm_formats import INDEX_MAP_SUFFIX, shown, summary

#: How many names an error shows for a pattern, and how near they must be (difflib's ratio).
_NEAR_NAMES, _NEAR = 3, 0.6


class Wish(NamedTuple):
    """Say what the user wants for a layer.

    Attributes:
        bits: Bits per code.
        groups: Tables per row, or "auto".
        dense: Why the layer stays dense, None if it is to be sketched.
    """

    bits: int
    groups: int | str
    dense: str | None = None

    def is_like(self, other: Wish) -> bool:
        """Return whether both say the same, whatever the reasons."""
        mine = (self.bits, self.groups, self.dense is None)
        return mine == (other.bits, other.groups, other.dense is None)

    def __str__(self) -> str:
        return "dense" if self.dense else f"{self.bits} bits and groups {self.groups}"


class Stored(NamedTuple):
    """Name rows of a parameter: the stored tensor that has them (None if none), the parameter."""

    tensor: str | None
    parameter: str

    @property
    def names(self) -> list[str]:
        """Return the names of the layer, in the model and in the checkpoint."""
        found = [self.parameter] if self.tensor is None else [self.parameter, self.tensor]
        return list(dict.fromkeys(name.removesuffix(INDEX_MAP_SUFFIX) for name in found))


class Wishes:
    """Find the wish for every layer, and in the end the patterns that match none.

    Args:
        config: Options of the conversion.
    """

    def __init__(self, config: SketchConfig) -> None:
        self._config = config
        self._rules: tuple[Rule, ...] = () if config.recipe is None else config.recipe.rules
        patterns = {*config.include, *config.ignore, *(rule.pattern for rule in self._rules)}
        # fnmatch keeps only 256 patterns, and a recipe may have an entry for every layer.
        self._compiled = {p: re.compile(fnmatch.translate(p)).match for p in patterns}
        self._seen: dict[str, None] = {}
        self._deciding: set[str] = set()

    def wish(self, together: Sequence[Stored]) -> Wish:
        """Return the wish for weights that are sketched together or not at all.

        Args:
            together: The weights.

        Raises:
            OptionError: If the recipe wants different things for them.
        """
        config = self._config
        names = list(dict.fromkeys(name for stored in together for name in stored.names))
        self._seen |= dict.fromkeys(names)
        wishes = [(stored, self._by_recipe(stored.names)) for stored in together]
        dense = self._dense(names)
        if dense is not None:
            return Wish(config.bits, config.groups_per_row, dense)
        first, wish = wishes[0]
        for other, different in wishes[1:]:
            if not different.is_like(wish):
                raise OptionError(
                    f"recipe: {first.names[-1]} and {other.names[-1]} must be sketched alike, "
                    f"because {_shared(first, other)}, but {wish} and {different} are given; use a "
                    f"pattern that matches both"
                )
        return wish

    def unwanted(self, tensor: str) -> str | None:
        """Return why a matrix of no linear layer stays dense by the user's wish, None if it is not.

        Args:
            tensor: Name of the tensor.
        """
        names = [tensor.removesuffix(INDEX_MAP_SUFFIX)]
        reason = self._dense(names) or self._by_recipe(names).dense
        if reason is not None:
            self._seen |= dict.fromkeys(names)
        return reason

    def check(self) -> None:
        """Raise OptionError if a pattern matches no layer, or decides none of a recipe."""
        kinds = list(dict.fromkeys(map(numbers_starred, self._seen)))
        problems = []
        rules = [rule.pattern for rule in self._rules]
        config = self._config
        for option, patterns in (
            ("--include", config.include),
            ("--ignore", config.ignore),
            ("--recipe", rules),
        ):
            for pattern in patterns:
                if not self._matches(pattern, self._seen):
                    problems.append(f"{option} {shown(pattern)}: {_near(pattern, kinds)}")
                elif option == "--recipe" and pattern not in self._deciding:
                    problems.append(
                        f"{option} {shown(pattern)}: decides no layer, because later entries match "
                        f"all of its layers; place it after them"
                    )
        if problems:
            raise OptionError(summary(problems))

    def _dense(self, names: Sequence[str]) -> str | None:
        """Return why layers stay dense by a pattern to include or to ignore."""
        config = self._config
        ignored = next((p for p in config.ignore if self._matches(p, names)), None)
        if ignored is not None:
            return f"ignored by the pattern {ignored!r}"
        if config.include and not any(self._matches(p, names) for p in config.include):
            return "not among the layers to include"
        return None

    def _by_recipe(self, names: Sequence[str]) -> Wish:
        config = self._config
        usual = Wish(config.bits, config.groups_per_row)
        rule = next((r for r in reversed(self._rules) if self._matches(r.pattern, names)), None)
        if rule is None:
            return usual
        self._deciding.add(rule.pattern)
        if rule.dense:
            return usual._replace(dense=f"left dense by the recipe's entry {rule.pattern!r}")
        return Wish(rule.bits or usual.bits, rule.groups or usual.groups)

    def _matches(self, pattern: str, names: Iterable[str]) -> bool:
        match = self._compiled[pattern]
        return any(match(name) for name in names)


def _shared(one: Stored, other: Stored) -> str:
    """Return what two weights have in common."""
    if one.parameter == other.parameter:
        return f"transformers loads both into {one.parameter}"
    if one.tensor == other.tensor:
        return f"both are stored in {one.tensor}"
    return "both are parts of the same parameters"


def _near(pattern: str, kinds: Sequence[str]) -> str:
    """Return that a pattern matches nothing, with the names that are nearest to it."""
    fixed = pattern.lstrip("*.")
    length = fixed.count(".") + 1
    ends: dict[str, str] = {}  # the last parts of a name, as many as the pattern has
    for kind in kinds:
        ends.setdefault(".".join(kind.split(".")[-length:]), kind)
    starred = numbers_starred(fixed)
    near = difflib.get_close_matches(starred, ends, _NEAR_NAMES, _NEAR)
    which = f"near names are {', '.join(ends[end] for end in near)}"
    if not near:
        which = f"names are {summary(list(kinds), ', ')}" if kinds else "it has none"
    return f"matches no linear layer of the model's blocks; {which}"
