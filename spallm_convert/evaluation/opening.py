"""Load any checkpoint with its tokenizer: sketched, dense, or a GGUF file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, PreTrainedModel

from spallm_convert.devices import AUTO_DEVICE, find_device
from spallm_convert.errors import OptionError, SourceError, SpallmError, one_line
from spallm_convert.hub_errors import clear_errors
from spallm_convert.runtime.loading import load_sketched, model_class
from spallm_convert.source.gguf import load_gguf
from spallm_convert.source.locate import Source, find_here, locate
from spallm_convert.source.tokenizer import load_tokenizer, read_tokenizer
from spallm_formats import CONFIG_FILE, QUANT_METHOD, read_json


def load_any(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = AUTO_DEVICE,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer: a sketched or dense checkpoint, or a GGUF file.

    Args:
        model: A folder, an id on the Hub, or a `.gguf` file.
        revision: Branch, tag or commit of a model on the Hub. None: the default branch.
        dtype: Torch dtype to compute in, or its name, such as "float32". "auto": the dtype of the
            checkpoint, or bfloat16 for a GGUF file.
        device: "cpu", "cuda", "cuda:N", or "auto" for a GPU if there is one.
        trust_remote_code: Allow model code from the repository.

    Returns:
        The model, in evaluation mode and on the device, and its tokenizer.

    Raises:
        OptionError: If the device or the dtype does not exist.
        SourceError: If the model or its tokenizer cannot be found or read.
        FormatError: If a sketched checkpoint breaks the format.
    """
    target: Any = find_device(device)
    dtype = _find_dtype(dtype)
    model = os.fspath(model)
    source = find_here(model, revision)
    trusted: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source is not None and source.is_gguf:
        loaded = _load_gguf(source, dtype)
        tokenizer = load_tokenizer(source)
    elif _is_sketched(model, source, revision):
        with _clear_loading(model):
            loaded = load_sketched(model, revision=revision, dtype=dtype, **trusted)
        place = source.path if source else model
        tokenizer = read_tokenizer(model, place, revision=revision, **trusted)
    else:
        source = source or locate(model, revision)
        source.open(source.path)  # refuses an incomplete checkpoint with a clear message
        loaded = _load_dense(source, dtype, trust_remote_code)
        tokenizer = read_tokenizer(model, source.path, **trusted)
    return loaded.to(target), tokenizer


def _find_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """Return the torch dtype of a name, or "auto"."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not isinstance(found, torch.dtype):
        raise OptionError(f"dtype {dtype!r}: unknown; accepted are 'auto' and dtypes of torch")
    return found or "auto"


def _is_sketched(model: str, source: Source | None, revision: str | None) -> bool:
    """Read `config.json`, from the Hub if there is no source here."""
    if source is not None:
        path = source.path / CONFIG_FILE
    else:
        with clear_errors(model, SourceError):
            path = Path(hf_hub_download(model, CONFIG_FILE, revision=revision))
    config = read_json(path)
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def _load_dense(
    source: Source, dtype: str | torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    loaded: PreTrainedModel
    with _clear_loading(source.name):
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=trust_remote_code)
        loaded, found = model_class(config).from_pretrained(
            source.path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"])[:5])
        raise SourceError(f"{source.name}: tensors are missing: {missing}")
    return loaded


@contextlib.contextmanager
def _clear_loading(model: str) -> Iterator[None]:
    """Turn any error of a model's code, if a checkpoint does not fit it, into one line."""
    try:
        yield
    except SpallmError:
        raise
    except Exception as error:
        raise SourceError(f"{model}: transformers cannot load it ({one_line(error)})") from error


def _load_gguf(source: Source, dtype: str | torch.dtype) -> PreTrainedModel:
    try:
        return load_gguf(source.path, torch.bfloat16 if isinstance(dtype, str) else dtype)
    except Exception as error:  # a damaged file may raise anything
        raise SourceError(
            f"{source.name}: transformers cannot read it ({one_line(error)})"
        ) from error
