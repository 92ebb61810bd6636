"""Match the patterns of layers that the user leaves dense (`--ignore`)."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from spallm_convert.errors import OptionError


def matches(pattern: str, *names: str) -> bool:
    """Return whether a pattern matches one of a layer's names (path, name in the checkpoint)."""
    return any(fnmatch.fnmatch(name, pattern) for name in names)


def check_patterns(patterns: tuple[str, ...], layers: Iterable[tuple[str, ...]]) -> None:
    """Raise OptionError if a pattern to ignore matches no layer.

    Args:
        patterns: The patterns.
        layers: All names of each layer.
    """
    unused = [p for p in patterns if not any(matches(p, *names) for names in layers)]
    if unused:
        raise OptionError(
            f"ignore patterns {unused} match no linear layer of the model's blocks; --dry-run "
            f"without --ignore lists the layers"
        )
