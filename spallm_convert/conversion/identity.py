"""Everything that decides the bytes of a conversion, for comparing one with another."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numba
import numpy
import scipy
import torch
import transformers
from torch import Tensor

from spallm_convert.config import SketchConfig
from spallm_convert.devices import device_name, has_fast_bfloat16
from spallm_convert.paths import user_path
from spallm_convert.version import __version__
from spallm_formats import FORMAT_VERSION

from .texts import Texts


def identity(
    config: SketchConfig,
    source: dict[str, Any],
    texts: Texts | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """What decides the bytes of a conversion; equal identities give equal checkpoints.

    texts: what a model is shown: what is in a file may change, and so may a tokenizer.
    device: where it is calibrated. GPUs sum in orders of their own, so each model of them counts
    as another device, as another version of torch does; among as many of one model none does.
    Healing multiplies in bfloat16 where that is fast, which counts too.
    """
    versions = {
        "spallm-convert": __version__,
        "numpy": numpy.__version__,
        "numba": numba.__version__,
        "transformers": transformers.__version__,
    }
    drawn = {}
    if texts is not None:
        assert device is not None
        drawn = {
            "calibration_tokens": _tokens_digest(texts.calibration),
            "device": device_name(device),
        }
        if texts.healing is not None:
            drawn["healing_tokens"] = _tokens_digest(texts.healing)
            if has_fast_bfloat16(device):
                drawn["device"] += ", bfloat16"
        versions["torch"] = torch.__version__
    if config.target_bits is not None:
        versions["scipy"] = scipy.__version__
    return drawn | {
        "format_version": FORMAT_VERSION,
        "versions": versions,
        "source": source,
        "options": _public(config.to_json()),
    }


def _public(options: dict[str, Any]) -> dict[str, Any]:
    """Options as others may see them: of a file of the user's, its name."""
    text = options["calibration"]
    if text is not None and user_path(text).is_file():
        return options | {"calibration": Path(text).name}
    return options


def _tokens_digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
