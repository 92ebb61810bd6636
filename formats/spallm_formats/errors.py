"""Define the errors that a checkpoint can cause.

SpallmError             anything a user can fix: bad input, a full disk, a missing token
└── FormatError         a checkpoint that breaks the format; lists every problem found
"""

from __future__ import annotations

from collections.abc import Sequence


class SpallmError(Exception):
    """Base class of every error in this project that the user can fix."""


class FormatError(SpallmError):
    """Report that a checkpoint breaks the format.

    Args:
        problems: One line, or one line per problem. All problems are reported together, so that a
            user can fix a folder at once.

    Attributes:
        problems: Every problem found, one line each.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))
