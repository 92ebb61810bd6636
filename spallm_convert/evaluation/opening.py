"""Any checkpoint as a model with its tokenizer: sketched, dense, or a GGUF file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spallm_convert.devices import AUTO_DEVICE, find_device
from spallm_convert.errors import SourceError, SpallmError, one_line
from spallm_convert.runtime.loading import load_sketched, model_class
from spallm_convert.source.hub import clear_errors
from spallm_convert.source.locate import Source, find_here, locate
from spallm_formats import CONFIG_FILE, QUANT_METHOD, load_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: One of them is in any folder with a tokenizer that has a vocabulary.
_OF_TOKENIZERS = ("tokenizer.json", "*vocab*", "*.model", "*.spm", "*.tiktoken", "*.gguf")
#: SentencePiece's mark before a word, which is in vocabularies that are otherwise empty.
_WORD_START = "\u2581"


def load_any(
    model: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = AUTO_DEVICE,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Loads a model and its tokenizer: a sketched or dense checkpoint, or a GGUF file.

    model: a folder, an id on the Hub or a `.gguf` file. dtype: "auto" (that of the checkpoint,
    bfloat16 for a GGUF file) or the name of a torch dtype. device: "cpu", "cuda", "cuda:1", ... or
    "auto" for a GPU if there is one. The model is in evaluation mode.
    Raises OptionError for a GPU that is not there, SpallmError naming the model when it, or its
    tokenizer, cannot be had.
    """
    target: Any = find_device(device)
    source = find_here(model, revision)
    trusted: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source is not None and source.is_gguf:
        loaded = _load_gguf(source, dtype)
        tokenizer = load_tokenizer(source)
    elif _is_sketched(model, source, revision):
        with _clear_loading(model):
            loaded = load_sketched(model, revision=revision, dtype=dtype, **trusted)
        place = source.path if source else model
        tokenizer = _load_tokenizer(model, place, revision=revision, **trusted)
    else:
        source = source or locate(model, revision)
        source.open(source.path)  # refuses, in words of our own, what is no whole checkpoint
        loaded = _load_dense(source, dtype, trust_remote_code)
        tokenizer = _load_tokenizer(model, source.path, **trusted)
    return loaded.to(target), tokenizer


def _is_sketched(model: str, source: Source | None, revision: str | None) -> bool:
    if source is not None:
        path = source.path / CONFIG_FILE
    else:
        from huggingface_hub import hf_hub_download

        with clear_errors(model, SourceError):
            path = Path(hf_hub_download(model, CONFIG_FILE, revision=revision))
    config = load_json(path.read_bytes(), str(path))
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def _load_dense(source: Source, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoConfig

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
    """Turns whatever a model's code makes of a checkpoint that does not suit it into one line."""
    try:
        yield
    except SpallmError:
        raise
    except Exception as error:
        raise SourceError(f"{model}: transformers cannot load it ({one_line(error)})") from error


def _load_gguf(source: Source, dtype: str) -> PreTrainedModel:
    import torch

    from spallm_convert.source.gguf import load_gguf

    try:
        return load_gguf(source.path, getattr(torch, "bfloat16" if dtype == "auto" else dtype))
    except Exception as error:  # a damaged file may raise anything
        raise SourceError(
            f"{source.name}: transformers cannot read it ({one_line(error)})"
        ) from error


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model that is on this machine. Raises SourceError when there is none."""
    if source.is_gguf:
        name = source.path.name
        return _load_tokenizer(source.name, source.path.parent, gguf_file=name)
    return _load_tokenizer(source.name, source.path, trust_remote_code=trust_remote_code)


def _load_tokenizer(model: str, place: str | Path, **options: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        with clear_errors(model, SourceError):
            tokenizer: Any = AutoTokenizer.from_pretrained(place, **options)
    except SourceError:
        raise
    except Exception as error:  # what it raises without files of a tokenizer differs by model
        folder = Path(place)
        lacks = folder.is_dir() and not any(any(folder.glob(p)) for p in _OF_TOKENIZERS)
        why = f"no file of one is in {folder}" if lacks else one_line(error)
        raise SourceError(f"{model}: its tokenizer cannot be loaded ({why})") from error
    if tokenizer.is_fast and not _has_vocabulary(tokenizer):
        why = f"no vocabulary is in {place}"
        raise SourceError(f"{model}: its tokenizer cannot be loaded ({why})")
    return tokenizer


def _has_vocabulary(tokenizer: Any) -> bool:
    """Returns whether there are tokens that are not special.

    For many models transformers makes a tokenizer without them if no file of one is there.
    """
    return bool(tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens, _WORD_START})
