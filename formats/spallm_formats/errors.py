"""Define the errors that a checkpoint can cause.

SpallmError             anything a user can fix: bad input, a full disk, a missing token
└── FormatError         a checkpoint that breaks the format; holds every problem found
"""

from __future__ import annotations

from collections.abc import Sequence

from .text import message, summary


class SpallmError(Exception):
    """Base class of every error in this project that the user can fix.

    Args:
        text: What is wrong. The error shows it on one line, without control characters, and cuts
            it in the middle if it is longer than 1,900 characters.
    """

    def __init__(self, text: str) -> None:
        super().__init__(message(text))


class FormatError(SpallmError):
    """Report that a checkpoint breaks the format.

    Args:
        problems: One line, or one line per problem. The text of the error names the first three
            and counts the others.

    Attributes:
        problems: Every problem found, one line each.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        found = [problems] if isinstance(problems, str) else problems
        self.problems = [message(problem) for problem in found]
        super().__init__(summary(self.problems))
