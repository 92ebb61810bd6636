"""What can go wrong, for callers to catch.

SpallmError             anything a user can mend
├── CalibrationError    a model that cannot be gone through block by block
├── EvaluationError     a model that cannot be measured
├── FormatError         a sketched checkpoint that breaks the format
├── OptionError         an option, or a combination of options, that cannot be used
├── SourceError         a model or a text that cannot be had or read
└── HubError            a push that the Hub refused
"""

from __future__ import annotations

from spallm_formats.errors import FormatError, SpallmError

__all__ = [
    "CalibrationError",
    "EvaluationError",
    "FormatError",
    "HubError",
    "OptionError",
    "SourceError",
    "SpallmError",
]


def one_line(error: BaseException) -> str:
    """What an error of someone else's says, to be put into one of ours."""
    return " ".join(str(error).split()) or type(error).__name__


class CalibrationError(SpallmError):
    """A model cannot be gone through block by block, or gives activations that are no numbers."""


class EvaluationError(SpallmError):
    """A model cannot be measured: it predicts no next tokens, or what it predicts is no number."""


class OptionError(SpallmError):
    """An option, or a combination of options, cannot be used."""


class SourceError(SpallmError):
    """The model, or a text to calibrate or measure with, cannot be had or read."""


class HubError(SpallmError):
    """The Hub cannot be reached or refused what was asked of it."""
