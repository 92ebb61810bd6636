"""Draw the texts of a conversion: to sketch for, and to heal on."""

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
    """What a model is shown, int64 [samples, seqlen] each: to be sketched for, and to be healed on
    if it is."""

    calibration: Tensor
    healing: Tensor | None


def draw_texts(source: Source, config: SketchConfig, *, trust_remote_code: bool) -> Texts:
    """Both texts of a conversion, from `config.calibration` by the source's tokenizer.

    For healing it is as much as there is and its steps would use; of many samples as many as make
    whole batches, since those that run at once divide their number. Raises SourceError for a text
    that is too short.
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
            f"{seqlen} tokens, to train on and to leave out"
        )
    batch = samples_at_once(seqlen)
    if len(healing) >= HEALING_BATCHES * batch:
        healing = healing[: len(healing) // batch * batch]
    return Texts(shown, healing)
