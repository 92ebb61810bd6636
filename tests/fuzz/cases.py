"""Name the cases of the fuzz suite: a family, a kind of mutation in it, and a seed.

A kind is a function that spoils a folder. It draws everything from a random generator, so a case is
replayed by its name alone: see `test_fuzz.py`.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Mutation = Callable[[Path, random.Random], None]

#: Families whose cases take long, and the share of seeds that they get.
SHARES = {"checkpoint": 1.0, "tables": 0.7, "source": 0.7, "work": 0.5, "gguf": 0.3}

#: Kinds that write large files, by the end of their names. They get fewer seeds still.
_LARGE, _LARGE_SHARE = ("fat", "deep", "many tensors", "sparse"), 0.2

#: Every kind of every family, in the order of definition.
KINDS: dict[str, dict[str, Mutation]] = {family: {} for family in SHARES}


@dataclass(frozen=True, order=True)
class Case:
    """Name one case."""

    family: str
    kind: str
    seed: int

    def __str__(self) -> str:
        return f"{self.family}/{self.kind}/{self.seed}"

    @classmethod
    def parse(cls, name: str) -> Case:
        """Return the case that a text names."""
        family, kind, seed = name.split("/")
        return cls(family, kind, int(seed))

    @property
    def mutation(self) -> Mutation:
        """Return the function that spoils the folder."""
        return KINDS[self.family][self.kind]

    @property
    def digest(self) -> str:
        """Return a short name for a folder."""
        return f"{self.family}-{zlib.crc32(str(self).encode()):08x}"

    def random(self) -> random.Random:
        """Return a generator that depends on nothing but the name of the case."""
        return random.Random(str(self))


def kind(family: str, name: str) -> Callable[[Mutation], Mutation]:
    """Register a function as a kind of mutation."""

    def register(mutation: Mutation) -> Mutation:
        add_kind(family, name, mutation)
        return mutation

    return register


def add_kind(family: str, name: str, mutation: Mutation) -> None:
    """Register a kind of mutation under a name that no other kind of the family has."""
    assert name not in KINDS[family], f"{family}/{name} is defined twice"
    KINDS[family][name] = mutation


def all_kinds() -> list[tuple[str, str]]:
    """Return every kind, as family and name."""
    return [(family, name) for family in SHARES for name in KINDS[family]]


def cases(total: int, first_seed: int = 0) -> list[Case]:
    """Return cases: at least one of each kind, more of the families that are fast.

    Args:
        total: Their number, if there are not more kinds.
        first_seed: The first seed of each kind. The others follow.
    """
    kinds = all_kinds()
    every = sum(map(_share, kinds))
    turns = [
        (turn / _share((family, name)), family, name, turn)
        for family, name in kinds
        for turn in range(2 + int(total * _share((family, name)) / every))
    ]
    chosen = sorted(turns)[: max(total, len(kinds))]
    return [Case(family, name, first_seed + turn) for _, family, name, turn in chosen]


def _share(kind: tuple[str, str]) -> float:
    family, name = kind
    return SHARES[family] * (_LARGE_SHARE if name.endswith(_LARGE) else 1.0)
