"""How a conversion tells what it is doing, and the one that keeps it to itself."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Is told how a conversion goes on."""

    def start(self, weights: int) -> None:
        """Called once, with the number of weights to sketch."""

    def advance(self, weights: int, tensor: str) -> None:
        """Called as weights of a tensor have been sketched, or found sketched already."""

    def say(self, line: str) -> None:
        """Called with a line on work that is not counted in weights, of interest for now."""

    def remark(self, line: str) -> None:
        """Called with a line that is to be read, and not to be overwritten by others."""


class Silent:
    def start(self, weights: int) -> None:
        pass

    def advance(self, weights: int, tensor: str) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def remark(self, line: str) -> None:
        pass
