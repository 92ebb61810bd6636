"""Report the progress of long work to a listener, and a listener that ignores it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receive the progress of a conversion, in weights, or of a measurement, in tokens.

    `convert`, `perplexity` and `evaluate_text` take any object with these four methods and call
    them from the thread that they run in. Arguments are passed by position. An error that a method
    raises ends the work.
    """

    def start(self, total: int, /) -> None:
        """Receive the total amount of counted work. It is called once, before `advance`.

        Args:
            total: Number of weights to sketch, or of tokens to measure.
        """

    def advance(self, amount: int, name: str = "", /) -> None:
        """Receive an amount that is done. All amounts of finished work add up to the total.

        Args:
            amount: Number of weights or tokens done since the last call. It includes work that an
                interrupted conversion has done before.
            name: Name of the tensor that is done, or "".
        """

    def say(self, line: str, /) -> None:
        """Receive a status line about work that is not counted. The next line may replace it.

        Args:
            line: One line of plain text.
        """

    def remark(self, line: str, /) -> None:
        """Receive a message for the user, which must stay readable.

        Args:
            line: One line of plain text. A line that begins with "warning:" should be shown even if
                no progress is.
        """


class Silent:
    """Ignore all progress."""

    def start(self, total: int, /) -> None:
        pass

    def advance(self, amount: int, name: str = "", /) -> None:
        pass

    def say(self, line: str, /) -> None:
        pass

    def remark(self, line: str, /) -> None:
        pass
