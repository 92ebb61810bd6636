"""Collect everything that decides the bytes of a conversion, to compare two conversions."""

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
from spallm_convert.paths import name_as_text, user_path
from spallm_convert.version import __version__
from spallm_formats import FORMAT_VERSION

from .texts import Texts


def identity(
    config: SketchConfig,
    source: dict[str, Any],
    texts: Texts | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Return what decides the bytes of a conversion. Equal identities give equal checkpoints.

    Args:
        config: Options of the conversion.
        source: Identity of the source, from `Source.identity`.
        texts: Tokens of the calibration text, which count because a text file or a tokenizer may
            change. None without calibration.
        device: Device of the calibration. Models of GPUs sum in different orders, so the name of
            the GPU counts, but not its number. Healing multiplies in bfloat16 on devices where that
            is fast, which counts too.

    Returns:
        A JSON object, also part of `conversion.json`.
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
    """Return options that may be published: a text file is named without its folder."""
    text = options["calibration"]
    if text is not None and user_path(text).is_file():
        return options | {"calibration": name_as_text(Path(text).name)}
    return options


def _tokens_digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
