"""Define the levels of effort: how much a conversion does for the quality of its result."""

from __future__ import annotations

from dataclasses import dataclass

FAST, NORMAL, HIGH, BEST = "fast", "normal", "high", "best"


@dataclass(frozen=True)
class Effort:
    """Describe a level.

    Attributes:
        name: Its name.
        what: What it does, in a few words.
        samples: Samples of the text, unless the user chooses another number.
        seqlen: Tokens per sample, likewise.
        heal: Steps of healing, likewise.
    """

    name: str
    what: str
    samples: int = 0
    seqlen: int = 0
    heal: int = 0

    @property
    def reads_text(self) -> bool:
        """Return whether the level needs a text."""
        return self.samples > 0


#: The levels by name, from the fastest to the best.
EFFORTS = {
    level.name: level
    for level in (
        Effort(FAST, "the weights alone"),
        Effort(
            NORMAL,
            "weights count as much as the inputs that they meet in a short text",
            samples=8,
            seqlen=256,
        ),
        Effort(
            HIGH,
            "layers are fitted to their inputs in a long text, one after the other",
            samples=128,
            seqlen=512,
        ),
        Effort(
            BEST,
            "as high, then the tables are tuned to predict as the dense model",
            samples=128,
            seqlen=512,
            heal=300,
        ),
    )
}


def tokens_of(effort: str) -> int:
    """Return the number of tokens that a level reads unless the user chooses another."""
    level = EFFORTS[effort]
    return level.samples * level.seqlen
