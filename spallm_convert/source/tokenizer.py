"""The tokenizer of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from spallm_convert.errors import SourceError, one_line
from spallm_convert.hub_errors import clear_errors

from .locate import Source

#: One of them is in any folder with a tokenizer that has a vocabulary.
_OF_TOKENIZERS = ("tokenizer.json", "*vocab*", "*.model", "*.spm", "*.tiktoken", "*.gguf")
#: SentencePiece's mark before a word, which is in vocabularies that are otherwise empty.
_WORD_START = "\u2581"


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model that is on this machine. Raises SourceError when there is none."""
    if source.is_gguf:
        name = source.path.name
        return read_tokenizer(source.name, source.path.parent, gguf_file=name)
    return read_tokenizer(source.name, source.path, trust_remote_code=trust_remote_code)


def read_tokenizer(model: str, place: str | Path, **options: Any) -> Any:
    """Load a tokenizer from a folder or an id on the Hub, with options of `from_pretrained`.

    model: its name in the SourceError that is raised when there is no tokenizer.
    """
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
    """Return whether there are tokens that are not special.

    For many models, transformers makes a tokenizer without such tokens if its files are missing.
    """
    return bool(tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens, _WORD_START})
