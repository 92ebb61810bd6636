"""Define the windows in which a text is measured: default size and distance, and limits.

This module does not import torch, so that `eval --help` answers at once.
"""

from __future__ import annotations

from spallm_convert.errors import OptionError

#: Tokens that the model sees at once, unless given, in Python and in `eval`.
WINDOW = 1024
#: Tokens from one window to the next, unless given; half of the window if that is less.
STRIDE = 512


def default_stride(window: int) -> int:
    """Return the tokens from one window to the next if no stride is given."""
    return min(STRIDE, max(1, window // 2))


def check_windows(window: int, stride: int) -> None:
    """Raise OptionError unless windows of this size and distance can be measured."""
    if window < 2 or not 1 <= stride <= window:
        raise OptionError(
            f"window must be at least 2 tokens and stride 1 to window, found window {window} and "
            f"stride {stride}"
        )
