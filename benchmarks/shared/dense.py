"""Prepare the dense model that benchmarks of whole models start from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from benchmarks.cpu.memory import LlamaShape, write_checkpoint
from spallm_convert.cli.demo_run import demo_model
from spallm_convert.errors import OptionError
from spallm_convert.source.gguf import dequantized
from spallm_convert.source.skeleton import read_skeleton
from spallm_formats import CONFIG_FILE, sha256

SHAPES = {
    "1.3b": LlamaShape(24, intermediate=5504, head=128, queries_per_key=1),
    "tiny": LlamaShape(2, hidden=64, intermediate=160, vocabulary=512, head=16, queries_per_key=2),
}

Linears = Mapping[str, tuple[int, int]]


def dense_folder(model: Path | None, shape: str | None, cache: Path) -> Path:
    """Return the folder of a dense model: a given one, random weights, or the installed demo.

    Models that are made are stored below `cache`, and made once.
    """
    if model is not None:
        if not (model / CONFIG_FILE).is_file():
            raise OptionError(
                f"{model} is not the folder of a Hugging Face model: no {CONFIG_FILE}"
            )
        return model
    if shape is None:
        path = demo_model()
        return dequantized(path, cache / path.stem)
    folder = cache / f"random-{shape}"
    done = cache / f"random-{shape}.complete"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
        cache.mkdir(parents=True, exist_ok=True)
        write_checkpoint(folder, SHAPES[shape])
        done.touch()
    return folder


def model_name(model: Path | None, shape: str | None = None) -> str:
    """Return the name in results of the model that `dense_folder` gives for the same arguments."""
    if model is not None:
        return model.resolve().name
    return shape or demo_model().stem


def digest(dense: Path) -> str:
    """Identify a model by its config and weights, whichever version of transformers wrote them."""
    config = json.loads((dense / CONFIG_FILE).read_text())
    config.pop("transformers_version", None)
    weights = map(sha256, sorted(dense.glob("*.safetensors")))
    text = json.dumps(config, sort_keys=True) + "".join(weights)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_linears(dense: Path) -> Linears:
    """Return (out_features, in_features) of the layers that are sketched or get adapters."""
    return read_skeleton(dense, json.loads((dense / CONFIG_FILE).read_text())).linears
