"""`CalibrationConfig`: the text that a conversion fits layers to, and how."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from .effort import NORMAL, Effort
from .errors import OptionError

#: Steps of calibrated sketching that can be left out: targets that make up for layers before, codes
#: that make up for each other, tables solved for their codes, codes improved one at a time.
STEPS = ("correction", "compensation", "least-squares", "descent")


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Options of calibration: the text that layers are fitted to, and how.

    Args:
        text: Source of the text, as `read_documents` takes it: "builtin", a text or JSON file, or a
            dataset on the Hub.
        samples: Number of samples drawn from the text, at least 1. None: as the effort has it.
        seqlen: Tokens per sample, at least 2. None: as the effort has it.
        without: Steps of `STEPS` to leave out, for the efforts "high" and "best".
        heal: Optimizer steps that tune all tables afterwards, so that the model predicts what the
            dense model predicts on a larger draw of the text. 0: no healing. None: 300 for the
            effort "best", 0 for the others.
        fallback: Sketch the weights alone, without calibration, if the model cannot be run block
            by block. Not together with `target_bits`, nor with healing, that of the effort "best"
            included: both need calibration. None: only for the effort "normal".
        target_bits: Bits per sketched weight, tables included. Each layer then gets the bits and
            groups for which the predicted loss is smallest, in place of `SketchConfig.bits`. For
            the efforts "high" and "best".

    Raises:
        OptionError: Names every value that is not accepted.
    """

    text: str = "builtin"
    samples: int | None = None
    seqlen: int | None = None
    without: tuple[str, ...] = ()
    heal: int | None = None
    fallback: bool | None = None
    target_bits: float | None = None

    def __post_init__(self) -> None:
        freeze_names(self, "without")
        problems = []
        if not isinstance(self.text, str):
            problems.append(f"text must be a source of text, found {self.text!r}")
        for name, least in (("samples", 1), ("seqlen", 2), ("heal", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                problems.append(f"{name} must be at least {least}, found {value!r}")
        if not are_names(self.without) or not set(self.without) <= set(STEPS):
            problems.append(f"without must be some of {STEPS}, found {self.without!r}")
        if self.fallback is not None and type(self.fallback) is not bool:
            problems.append(f"fallback must be True or False, found {self.fallback!r}")
        target = self.target_bits
        if target is not None:
            if type(target) not in (int, float) or not (math.isfinite(target) and target > 0):
                problems.append(f"target_bits must be a number above 0, found {target!r}")
            if self.fallback:
                problems.append("target_bits: not with fallback, which may leave calibration out")
        if problems:
            raise OptionError("; ".join(problems))
        if target is not None:
            object.__setattr__(self, "target_bits", float(target))

    def at(self, level: Effort) -> CalibrationConfig:
        """Return these options with those of an effort in place of None."""
        return replace(
            self,
            samples=self.samples or level.samples,
            seqlen=self.seqlen or level.seqlen,
            heal=level.heal if self.heal is None else self.heal,
            # With target_bits or heal, fallback would be refused instead of the effort normal.
            fallback=(
                level.name == NORMAL and self.target_bits is None and not self.heal
                if self.fallback is None
                else self.fallback
            ),
        )

    @property
    def drawn(self) -> tuple[int, int]:
        """Return the numbers of samples and of tokens per sample."""
        assert self.samples is not None  # `at` has set both
        assert self.seqlen is not None
        return self.samples, self.seqlen


def freeze_names(config: Any, name: str) -> None:
    """Turn a sequence of names into a tuple, so that the config can be hashed and compared."""
    value = getattr(config, name)
    if isinstance(value, Iterable) and not isinstance(value, str):
        object.__setattr__(config, name, tuple(value))


def are_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)
