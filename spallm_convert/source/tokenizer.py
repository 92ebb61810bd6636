"""Load the tokenizer of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from spallm_convert.errors import SourceError, one_line
from spallm_convert.hub_errors import clear_errors
from spallm_formats import FormatError, refuse_pointer

from .locate import Source

#: Every folder with a tokenizer that has a vocabulary has one of these files.
_OF_TOKENIZERS = (
    *("tokenizer.json", "*vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "*.gguf"),
)
_POINTER_BYTES = 64
#: SentencePiece's mark before a word, which is in vocabularies that are otherwise empty.
_WORD_START = "\u2581"


def has_tokenizer_files(names: Iterable[str]) -> bool:
    """Return whether a tokenizer's vocabulary is among files.

    Args:
        names: Paths of the files, relative to the model's folder.
    """
    here = [name for name in names if "/" not in name]
    return any(fnmatch.filter(here, pattern) for pattern in _OF_TOKENIZERS)


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model on this machine.

    Args:
        source: The model.
        trust_remote_code: Whether Python code in its folder may be run.

    Returns:
        The tokenizer.

    Raises:
        SourceError: If there is none, or it cannot be loaded.
    """
    if source.is_gguf:
        name = source.path.name
        return read_tokenizer(source.name, source.path.parent, gguf_file=name)
    return read_tokenizer(source.name, source.path, trust_remote_code=trust_remote_code)


def read_tokenizer(model: str, place: str | Path, **options: Any) -> Any:
    """Load a tokenizer from a folder or the Hub.

    Args:
        model: Name of the model, for messages.
        place: Folder, or id on the Hub.
        **options: Options of `AutoTokenizer.from_pretrained`.

    Returns:
        The tokenizer.

    Raises:
        SourceError: If there is none, it cannot be loaded, or git-lfs has not fetched it.
    """
    if "gguf_file" not in options:
        _refuse_pointers(model, Path(place))
    try:
        with clear_errors(model, SourceError):
            tokenizer: Any = AutoTokenizer.from_pretrained(place, **options)
    except SourceError:
        raise
    except UnicodeEncodeError as error:  # tokenizers takes no other paths
        raise SourceError(
            f"{model}: the path of its folder is not UTF-8, which tokenizers cannot open; rename it"
        ) from error
    except Exception as error:  # without files of a tokenizer, models raise different errors
        folder = Path(place)
        lacks = folder.is_dir() and not any(any(folder.glob(p)) for p in _OF_TOKENIZERS)
        raise no_tokenizer(
            model, f"no tokenizer files in {folder}" if lacks else one_line(error)
        ) from error
    if tokenizer.is_fast and not _has_vocabulary(tokenizer):
        raise no_tokenizer(model, f"no vocabulary in {place}")
    return tokenizer


def _refuse_pointers(model: str, folder: Path) -> None:
    """Raise SourceError if git-lfs has not fetched a vocabulary: it could be read as one."""
    for path in (path for pattern in _OF_TOKENIZERS for path in folder.glob(pattern)):
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(_POINTER_BYTES)
            try:
                refuse_pointer(start, str(path))
            except FormatError as error:
                raise SourceError(f"{model}: {error}") from error


def no_tokenizer(model: str, why: str) -> SourceError:
    """Return the error for a model without a tokenizer that can be loaded, not raised.

    Args:
        model: Name of the model.
        why: Why it cannot be loaded.
    """
    return SourceError(
        f"{model}: its tokenizer cannot be loaded ({why}); put the files of its tokenizer into the "
        f"model's folder"
    )


def _has_vocabulary(tokenizer: Any) -> bool:
    """Return whether there are tokens that are not special.

    For many models, transformers makes a tokenizer without such tokens if its files are missing.
    """
    return bool(tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens, _WORD_START})
