"""Open the blocks of a model for a text, in batches that fit."""

from __future__ import annotations

import torch
from torch import Tensor

from spallm_convert.errors import CalibrationError
from spallm_convert.sketch.plan import Plan
from spallm_convert.source.causal import check_tokens, predicts_next_token
from spallm_convert.source.checkpoint import DenseCheckpoint
from spallm_convert.source.skeleton import build_empty

from .blocks import Blocks

#: Tokens that go through a block at once.
_BATCH_TOKENS = 4096
#: For healing there are at least so many batches, if there are as many samples.
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
    """The blocks of a model, to be gone through with a text on a device.

    to_heal: in more batches, so that some can be left out.

    Raises CalibrationError when that cannot be done, or the model is no causal language model;
    OptionError for samples that are longer than the model takes.
    """
    model = build_empty(checkpoint.folder, checkpoint.config, trust_remote_code=trust_remote_code)
    if not predicts_next_token(model):
        raise CalibrationError(
            f"{type(model).__name__} is no causal language model, and calibration needs one"
        )
    samples, seqlen = tokens.shape
    check_tokens(model, tokens, seqlen, f"seqlen {seqlen}")
    most = samples // min(samples, HEALING_BATCHES) if to_heal else samples
    batch = max(n for n in range(1, min(most, samples_at_once(seqlen)) + 1) if samples % n == 0)
    paths = plan.by_path
    return Blocks(model, checkpoint.tensors, paths, tokens, batch=batch, device=device)


def samples_at_once(seqlen: int) -> int:
    """Samples that may go through a block at once."""
    return max(1, _BATCH_TOKENS // seqlen)
