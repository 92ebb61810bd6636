"""How long work tells what it is doing, and a listener that ignores it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Is told how far a conversion is, in weights, or a measurement, in tokens."""

    def start(self, total: int, /) -> None:
        """Take the amount of counted work: weights to sketch, or tokens to measure. Called once."""

    def advance(self, amount: int, name: str = "", /) -> None:
        """Take an amount that is done, or was found done, and the name of its tensor if any."""

    def say(self, line: str, /) -> None:
        """Take a line on work that is not counted. The next line may overwrite it."""

    def remark(self, line: str, /) -> None:
        """Take a line to be read, which no other may overwrite."""


class Silent:
    """Ignores everything."""

    def start(self, total: int, /) -> None:
        pass

    def advance(self, amount: int, name: str = "", /) -> None:
        pass

    def say(self, line: str, /) -> None:
        pass

    def remark(self, line: str, /) -> None:
        pass
