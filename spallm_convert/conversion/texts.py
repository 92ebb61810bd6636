"""Draw the calibration text and the healing text of a conversion."""

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
    """Hold the texts of a conversion.

    Attributes:
        calibration: Token ids that the sketch is fitted to, int64 [samples, seqlen].
        healing: Token ids that tables are trained on, int64 [samples, seqlen]. None without
            healing.
    """

    calibration: Tensor
    healing: Tensor | None


def draw_texts(source: Source, config: SketchConfig, *, trust_remote_code: bool) -> Texts:
    """Tokenize the source of text in `config.text_options`, and draw samples of it.

    For healing, as many samples are drawn as its steps use, or fewer if the text is short. If there
    are many, their number is a multiple of the batch, because batches must divide it.

    Args:
        source: The model, whose tokenizer is used.
        config: Options of the conversion, with calibration.
        trust_remote_code: Whether Python code in the model's folder may be run.

    Returns:
        The texts.

    Raises:
        SourceError: If the text cannot be read or is too short, or there is no tokenizer.
    """
    calibration = config.text_options
    assert calibration is not None
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    text = CalibrationText(tokenizer, calibration.text)
    (samples, seqlen), seed = calibration.drawn, config.seed
    shown = text.draw(samples=samples, seqlen=seqlen, seed=seed)
    if not calibration.heal:
        return Texts(shown, None)
    most = samples_for(calibration.heal, seqlen)
    healing = text.draw(samples=most, seqlen=seqlen, seed=seed, or_fewer=True)
    if len(healing) < 2:
        raise SourceError(
            f"text {calibration.text!r} is too short: found {len(healing)} sample of {seqlen} "
            f"tokens, healing needs at least 2, to train on and to measure on; use a longer text "
            f"or a smaller --seqlen"
        )
    batch = samples_at_once(seqlen)
    if len(healing) >= HEALING_BATCHES * batch:
        healing = healing[: len(healing) // batch * batch]
    return Texts(shown, healing)
