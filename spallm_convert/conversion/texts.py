"""Draw the texts of a conversion: one to calibrate with, and one to heal on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from spallm_convert.calibration.blocks.opening import HEALING_BATCHES, samples_at_once
from spallm_convert.calibration.healing.heal import samples_for
from spallm_convert.calibration.windows import CalibrationText
from spallm_convert.config import SketchConfig
from spallm_convert.errors import SourceError
from spallm_convert.source.locate import Source
from spallm_convert.source.tokenizer import load_tokenizer


class Texts(NamedTuple):
    """The texts of a conversion, int64 [samples, seqlen] each.

    Attributes:
        calibration: The text that layers are fitted to.
        healing: The text that healing trains on. None without healing.
    """

    calibration: Tensor
    healing: Tensor | None


def draw_texts(source: Source, config: SketchConfig, *, trust_remote_code: bool) -> Texts:
    """Draw both texts of a conversion.

    Healing gets as many samples as its steps use, or as many as the text has. A large number of
    samples is reduced to whole batches, because all batches must have the same size.

    Args:
        source: The source, whose tokenizer is used.
        config: Options of the conversion, with calibration.
        trust_remote_code: Whether to run tokenizer code from the source.

    Raises:
        OptionError: Samples are too few, or too short.
        SourceError: The text cannot be read, or is too short.
    """
    calibration = config.calibration
    assert calibration is not None
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    text = CalibrationText(tokenizer, calibration.text)
    seqlen, seed = calibration.seqlen, config.seed
    shown = text.draw(samples=calibration.samples, seqlen=seqlen, seed=seed)
    if not calibration.heal:
        return Texts(shown, None)
    most = samples_for(calibration.heal, seqlen)
    healing = text.draw(samples=most, seqlen=seqlen, seed=seed, or_fewer=True)
    if len(healing) < 2:
        raise SourceError(
            f"text {calibration.text!r} is too short: healing takes at least 2 samples of "
            f"{seqlen} tokens, one to train on and one to hold out; use a longer text or a smaller "
            f"--seqlen"
        )
    batch = samples_at_once(seqlen)
    if len(healing) >= HEALING_BATCHES * batch:
        healing = healing[: len(healing) // batch * batch]
    return Texts(shown, healing)
