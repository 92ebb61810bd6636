"""Open the blocks of a model for a text, in batches of a suitable size."""

from __future__ import annotations

import torch
from torch import Tensor

from spallm_convert.errors import CalibrationError
from spallm_convert.sketch.plan import Plan
from spallm_convert.source.causal import check_tokens
from spallm_convert.source.checkpoint import DenseCheckpoint
from spallm_convert.source.skeleton import build_empty

from .blocks import Blocks

#: Most tokens that go through a block at once.
_BATCH_TOKENS = 4096
#: Least number of batches for healing, if there are as many samples.
HEALING_BATCHES = 8


def open_blocks(
    checkpoint: DenseCheckpoint,
    plan: Plan,
    tokens: Tensor,
    *,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    to_heal: bool = False,
) -> Blocks:
    """Open the blocks of a model, to run them on a text.

    Args:
        checkpoint: The dense checkpoint.
        plan: The layers to sketch.
        tokens: The text, int64 [samples, seqlen].
        device: The device to compute on.
        trust_remote_code: Whether to run model code from the checkpoint.
        to_heal: Make at least `HEALING_BATCHES` batches, so that some can be held out.

    Returns:
        The blocks, in batches of equal size.

    Raises:
        CalibrationError: The model reads something else than text, or cannot be run block by block.
        OptionError: Samples are longer than the model takes, or a token is not in its vocabulary.
    """
    model = build_empty(checkpoint.folder, checkpoint.config, trust_remote_code=trust_remote_code)
    check_reads_text(type(model).__name__, model.main_input_name)
    samples, seqlen = tokens.shape
    check_tokens(model, tokens, seqlen, f"seqlen {seqlen}")
    most = samples // min(samples, HEALING_BATCHES) if to_heal else samples
    batch = max(n for n in range(1, min(most, samples_at_once(seqlen)) + 1) if samples % n == 0)
    paths = dict.fromkeys(layer.path for layer in plan.layers.values())
    return Blocks(model, checkpoint.tensors, paths, tokens, batch=batch, device=device)


def check_reads_text(name: str, main_input: str) -> None:
    """Raise CalibrationError if a model reads something else than text.

    Args:
        name: Name of the model's class.
        main_input: Name of its main input.
    """
    if main_input != "input_ids":
        raise CalibrationError(
            f"{name} reads {main_input}, and calibration needs a model that reads text"
        )


def samples_at_once(seqlen: int) -> int:
    """Return the number of samples that may go through a block at once, at least 1."""
    return max(1, _BATCH_TOKENS // seqlen)
