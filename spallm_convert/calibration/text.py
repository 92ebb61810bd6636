"""Text to calibrate or to measure with: read from where the user has it, cut into windows.

A source is `builtin`, a file (plain text, or JSON records), or a dataset on the Hub. Reading is
cheap beside tokenising, so files are read whole, but only as much is tokenised as a fair draw
needs.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spallm_convert.errors import OptionError, SourceError, SpallmError, one_line

if TYPE_CHECKING:
    import torch

BUILTIN = "builtin"
ACCEPTED = f"{BUILTIN!r}, a text, .json or .jsonl file, or a dataset ORG/NAME[[:CONFIG]:SPLIT]"

_JSON_SUFFIXES = (".json", ".jsonl")
_DATASET = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(:[^:/]+){0,2}")
_RECORD_KEYS = "'text', 'messages' or 'instruction' (with 'input' and 'output')"

#: Of a dataset on the Hub this much is read: some 16 M tokens, sixty times a usual calibration set.
_HUB_CHARACTERS = 1 << 26
#: Long documents are tokenised in pieces of this many characters, some 16 k tokens, ...
_PIECE = 1 << 16
#: ... so many pieces at a time, ...
_BATCH = 64
#: ... until there are this many times the tokens that are drawn.
_POOL = 4


def read_documents(source: str) -> list[str]:
    """The documents of a source, none of them empty.

    source: `builtin` (the English documentation that Python brings), a text file in UTF-8 (one
    document), a `.jsonl` file or a `.json` file with a list (a document per record: its `text`,
    the contents of its `messages`, or its `instruction`, `input` and `output`), or a dataset on
    the Hub, `ORG/NAME[[:CONFIG]:SPLIT]` with the split `train` unless named, of which the first
    64 Mi characters are taken; that needs the package `datasets`.
    Raises SourceError when there is no such source, it cannot be read, or it holds no text.
    """
    path = Path(source).expanduser()
    if source == BUILTIN:
        documents = [english_text()]
    elif path.is_file():
        documents = _read_file(path)
    elif _DATASET.fullmatch(source) and path.suffix not in {".txt", *_JSON_SUFFIXES}:
        documents = _read_dataset(source)
    else:
        found = "a folder" if path.is_dir() else "no such file"
        raise SourceError(f"text {source!r}: {found}; accepted are {ACCEPTED}")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise SourceError(f"text {source!r}: there is no text in it")
    return documents


def english_text() -> str:
    """English prose that every Python has: the topics of its documentation."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def calibration_tokens(
    tokenizer: Any, source: str, *, samples: int, seqlen: int, seed: int, or_fewer: bool = False
) -> torch.Tensor:
    """Windows of a source's text, drawn at random: int64 [samples, seqlen], on the CPU.

    or_fewer: of a text that is too short for so many, take as many as it has, but one at least.

    Documents are tokenised without special tokens and joined, with the tokenizer's end-of-text
    token between them where it has one. Every placement of `samples` windows that do not overlap
    is equally likely; they come in the order of the text. Where the tokenizer puts a
    beginning-of-text token before what it encodes, every window starts with it (and has seqlen - 1
    tokens of text), since that is what the model sees in use: models that know such a token treat
    the first place of a sequence unlike all others.

    Of more text than four times what is drawn, pieces of at most 64 Ki characters are chosen at
    random, tokenised, and put back into their order. Same tokenizer, source, numbers and version
    of NumPy give the same windows; the generator is seeded with `seed`, no global one is touched.
    Raises OptionError for numbers that cannot be used, SourceError for a text that cannot be read
    or is too short.
    """
    import torch

    if samples < 1 or seqlen < 2 or seed < 0:
        raise OptionError(
            f"calibration takes at least 1 sample of at least 2 tokens and a seed of at least 0, "
            f"found samples={samples}, seqlen={seqlen}, seed={seed}"
        )
    prefix = _beginning(tokenizer)
    length = seqlen - len(prefix)
    generator = np.random.default_rng(seed)
    pieces = list(_pieces(read_documents(source)))
    tokens = _pool(tokenizer, pieces, _POOL * samples * length, generator)
    if or_fewer:
        samples = max(1, min(samples, len(tokens) // length))
    spare = len(tokens) - samples * length
    if spare < 0:
        raise SourceError(
            f"text {source!r} is too short: it has {len(tokens):,} tokens, {samples * length:,} "
            f"are needed for {samples} samples of {length}"
        )
    # Choosing among spare + samples places, and widening each to a window, is choosing among all
    # placements of windows that do not overlap.
    places = np.sort(generator.choice(spare + samples, samples, replace=False))
    starts = places + np.arange(samples) * (length - 1)
    windows = tokens[starts[:, None] + np.arange(length)]
    first = np.tile(np.array(prefix, np.int64), (samples, 1))
    return torch.from_numpy(np.concatenate([first, windows], axis=1))


def _beginning(tokenizer: Any) -> list[int]:
    """The beginning-of-text token, where the tokenizer puts one before what it encodes."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _pieces(documents: list[str]) -> Iterator[tuple[int, str]]:
    """The documents cut into pieces at ends of lines or words: pairs of (document, piece)."""
    for number, text in enumerate(documents):
        start = 0
        while start < len(text):
            end = start + _PIECE
            if end < len(text):
                # Before white space, as most tokenizers join a space with the word after it.
                cut = max(text.rfind(white, start + 1, end) for white in " \n")
                end = cut if cut > start else end
            yield number, text[start:end]
            start = end


def _pool(
    tokenizer: Any, pieces: list[tuple[int, str]], enough: int, generator: np.random.Generator
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of pieces chosen at random until there are enough, int64 [n], in order of the text."""
    chosen: dict[int, list[int]] = {}
    total = 0
    order = generator.permutation(len(pieces)).tolist()
    for first in range(0, len(order), _BATCH):
        batch = order[first : first + _BATCH]
        texts = [pieces[i][1] for i in batch]
        # verbose=False: no remark that this is longer than the model's context.
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        chosen.update(zip(batch, encoded, strict=True))
        total += sum(map(len, encoded))
        if total >= enough:
            break
    joined: list[int] = []
    before: int | None = None
    for i in sorted(chosen):
        follows = before is None or (i == before + 1 and pieces[i][0] == pieces[before][0])
        if not follows and tokenizer.eos_token_id is not None:
            joined.append(tokenizer.eos_token_id)
        joined += chosen[i]
        before = i
    return np.array(joined, np.int64)


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 (byte {error.start})") from error
    if path.suffix not in _JSON_SUFFIXES:
        return [text]
    if path.suffix == ".jsonl":
        lines = [(f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), 1)]
        return [_document(_parse(line, where), where) for where, line in lines if line.strip()]
    records = _parse(text, str(path))
    if not isinstance(records, list):
        raise SourceError(f"{path}: holds {_kind(records)}, expected a list of records")
    return [_document(record, f"{path}, record {i}") for i, record in enumerate(records)]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not JSON ({error})") from error


def _document(record: Any, where: str) -> str:
    """The text of a record."""
    if not isinstance(record, dict):
        raise SourceError(f"{where}: {_kind(record)}, expected an object with {_RECORD_KEYS}")
    if "text" in record:
        parts = [record["text"]]
    elif "messages" in record:
        parts = list(_contents(record["messages"], where))
    elif "instruction" in record:
        parts = [record.get(key) for key in ("instruction", "input", "output")]
    else:
        found = ", ".join(map(repr, record)) or "none"
        raise SourceError(f"{where}: found the keys {found}, expected {_RECORD_KEYS}")
    for part in parts:
        if not isinstance(part, str | None):
            raise SourceError(f"{where}: {_kind(part)} where text is expected")
    joined = "\n\n".join(part for part in parts if part)
    # JSON can spell half a surrogate pair, which no tokenizer takes.
    return joined.encode("utf-8", "replace").decode()


def _contents(messages: Any, where: str) -> Iterator[Any]:
    """What is said in a chat: the contents of its messages, or the texts that they are lists of."""
    for message in messages if isinstance(messages, list) else [messages]:
        if not isinstance(message, dict) or "content" not in message:
            raise SourceError(f"{where}: 'messages' must be a list of objects with 'content'")
        content = message["content"]
        if isinstance(content, list):
            yield from (part.get("text") for part in content if isinstance(part, dict))
        else:
            yield content


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"


def _read_dataset(source: str) -> list[str]:
    """The first documents of a split of a dataset on the Hub, streamed."""
    name, *parts = source.split(":")
    split = parts.pop() if parts else "train"
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise SourceError(
            f"text {source!r}: no such file, and reading a dataset of the Hub needs the package "
            f"'datasets': pip install datasets"
        ) from error
    try:
        records = datasets.load_dataset(name, *parts, split=split, streaming=True)
        return _first_documents(records, source)
    except SpallmError:
        raise
    except Exception as error:  # its errors are many, from missing names to failed connections
        reason = one_line(error)
        raise SourceError(
            f"text {source!r}: no such file, and no dataset either ({reason})"
        ) from error


def _first_documents(records: Iterable[Any], source: str) -> list[str]:
    documents: list[str] = []
    characters = 0
    for i, record in enumerate(records):
        documents.append(_document(record, f"{source}, record {i}"))
        characters += len(documents[-1])
        if characters >= _HUB_CHARACTERS:
            break
    return documents
