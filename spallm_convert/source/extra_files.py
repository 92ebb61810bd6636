"""Choose the files of a model that are copied besides its weights, and refuse what is not safe.

A model's folder may hold anything: notes, keys, results. So only files are copied that transformers
is known to read: by name, or because the model's own code names them.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from spallm_convert.errors import SourceError
from spallm_formats import CONFIG_FILE, FormatError, open_regular, refuse_pointer

from .model_code import code_files

#: Files that belong to a model: configs, tokenizer, processor, chat templates, licence.
EXTRA_FILES = (
    "generation_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    # Vocabularies, by the names that tokenizers of transformers give them.
    "bpe.codes",
    "byte_maps.json",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "merges.txt",
    "normalizer.json",
    "prophetnet.tokenizer",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "target_vocab.json",
    "tekken.json",
    "tokenizer.model",
    "tokenizer.model.v[0-9]*",  # of Mistral
    "vocab-src.json",
    "vocab-tgt.json",
    "vocab.json",
    "vocab.txt",
    "word_pronunciation.json",
    "word_shape.json",
    "*.spm",
    "*.tiktoken",
    "tiktoken.model",
    # Processors of images, video and audio.
    "audio_tokenizer_config.json",
    "feature_extractor_config.json",
    "image_processor_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    # sentence-transformers.
    "config_sentence_transformers.json",
    "modules.json",
    "sentence_*_config.json",
    "[1-9]_*/config.json",
    "LICENSE*",
    "LICENCE*",
    "[Ll]icen[sc]e",
    "[Ll]icen[sc]e.txt",
    "[Ll]icen[sc]e.md",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
)
#: Files that code of a model may read. They are copied if the code names them.
_OF_CODE = ("*.py", "*.json", "*.txt", "*.model", "*.bpe", "*.codes", "*.vocab")
_NOT_OF_CODE = (
    "*.index.json",
    CONFIG_FILE,
    "conversion.json",
    "adapter_*",
    "requirements*.txt",
    "trainer_state.json",  # Trainer writes this file and the next
    "*_results.json",
)
#: Files that nobody expects in the result, which need no remark.
_SILENT = (
    *(".*", "README.md", CONFIG_FILE, "conversion.json", "*.index.json", "trainer_state.json"),
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.onnx_data"),
    *("*.h5", "*.msgpack", "*.ot", "*.tflite", "*.npz"),
)
_MOST_BYTES = 1 << 28
_POINTER_BYTES = 64


def extra_files(folder: Path) -> list[str]:
    """List the files of a model besides its weights, config and card.

    Args:
        folder: Folder of the model.

    Returns:
        Sorted paths, relative to the folder.

    Raises:
        SourceError: If one of them, or the config, is a link out of the folder, not a regular file,
            too large, or only a git-lfs pointer.
    """
    own_code, quoted = code_files(folder)
    names = {path.relative_to(folder).as_posix() for path in _candidates(folder)}
    of_code = own_code | {name for name in quoted if _may_be_of_code(name)}
    chosen = sorted(name for name in names if _is_known(name) or name in of_code)
    for name in (CONFIG_FILE, *chosen):
        _check_file(folder, name)
    return chosen


def is_extra_file(name: str) -> bool:
    """Return whether a file of a repository may be one of `extra_files`, given its path in it.

    It is only certain once the files are here, because code of the model may name further files.
    """
    return _is_known(name) or _may_be_of_code(name)


def left_behind(folder: Path, copied: Iterable[str]) -> list[str]:
    """List the files next to a model that are not copied, without weights and hidden files.

    Args:
        folder: Folder of the model.
        copied: The files that are copied, from `extra_files`.

    Returns:
        Sorted names.
    """
    taken = set(copied)
    names = (path.name for path in folder.iterdir() if not path.is_dir())
    return sorted(name for name in names if name not in taken and not _matches(name, _SILENT))


def leads_inside(folder: Path, path: Path) -> bool:
    """Return whether a path leads to a place in the folder of its model.

    Links are followed. Snapshots in the Hub's cache are made of links to its own blobs: these count
    as inside.
    """
    try:
        root, real = folder.resolve(), path.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        return False
    in_blobs = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    return in_blobs or real.is_relative_to(root)


def _check_file(folder: Path, name: str) -> None:
    """Raise SourceError if a file of a model must not or cannot be copied."""
    if not leads_inside(folder, folder / name):
        raise SourceError(
            f"{folder}: {name} is a link out of the folder, which is not followed; replace it by a "
            f"copy of the file (cp -L), or remove it"
        )
    try:
        name.encode()
        with open_regular(folder / name) as file:
            refuse_pointer(file.read(_POINTER_BYTES), name)
            size = os.fstat(file.fileno()).st_size
    except UnicodeEncodeError as error:
        raise SourceError(f"{folder}: the name {name} is not UTF-8; rename the file") from error
    except FormatError as error:
        raise SourceError(f"{folder}: {error}") from error
    except OSError as error:
        raise SourceError(f"{folder}: {name} cannot be read ({error.strerror})") from error
    if size > _MOST_BYTES:
        raise SourceError(
            f"{folder}: {name} has {size:,} bytes, expected at most {_MOST_BYTES:,} besides the "
            f"weights; remove it"
        )


def _candidates(folder: Path) -> list[Path]:
    """Return the files of a folder, and those of its sub-folders that may belong to a model."""
    nested = (path for pattern in EXTRA_FILES if "/" in pattern for path in folder.glob(pattern))
    return [path for path in (*folder.iterdir(), *nested) if not path.is_dir()]


def _is_known(name: str) -> bool:
    return _matches(name, EXTRA_FILES) and not name.startswith(".")


def _may_be_of_code(name: str) -> bool:
    hidden = name.startswith(".") or _matches(name, _NOT_OF_CODE)
    return not hidden and _matches(name, _OF_CODE)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(
        name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)
        for pattern in patterns
    )
