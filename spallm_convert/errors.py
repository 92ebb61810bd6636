"""Define the errors that callers can catch.

SpallmError             any error that a user can mend
├── CalibrationError    the model cannot be calibrated block by block
├── EvaluationError     the model cannot be measured
├── FormatError         a sketched checkpoint breaks the format
├── HubError            the Hub cannot be reached or refuses
├── OptionError         an option, or a combination of options, cannot be used
└── SourceError         a model or a text cannot be found or read
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
    """Return the message of another library's error on one line, to put into an error of ours."""
    return " ".join(str(error).split()) or type(error).__name__


class CalibrationError(SpallmError):
    """Report a model that cannot be calibrated block by block, or activations not finite."""


class EvaluationError(SpallmError):
    """Report a model that cannot be measured: not a causal language model, or a loss not finite."""


class OptionError(SpallmError):
    """Report an option, or a combination of options, that cannot be used."""


class SourceError(SpallmError):
    """Report a model, or a text to calibrate or measure with, that cannot be found or read."""


class HubError(SpallmError):
    """Report that the Hub cannot be reached, or that it refused a request."""
