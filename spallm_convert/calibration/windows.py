"""Draw random windows of tokens from a text, to calibrate with.

Reading is cheap compared with tokenising. So a source is read as a whole, but only as much of it is
tokenised as a fair draw needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spallm_convert.errors import OptionError, SourceError
from spallm_convert.source.text import BUILTIN, read_documents

from .conversations import conversations

#: Long documents are tokenised in pieces of 64 Ki characters, about 16 k tokens.
_PIECE = 1 << 16
#: Number of pieces that are tokenised at a time.
_BATCH = 64
#: Tokenising stops at 4 times the tokens that are drawn.
_POOL = 4


class CalibrationText:
    """The text of a source, which is read once, however often windows are drawn.

    Documents are tokenised without special tokens, in pieces of at most 64 Ki characters, and then
    joined. If the tokenizer has an end-of-text token, it stands between them. The built-in text is
    written as conversations if the tokenizer has a chat template.

    Args:
        tokenizer: The model's tokenizer.
        source: Source of the text, as `read_documents` takes it.

    Raises:
        SourceError: The text cannot be read.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._tokenizer, self._source = tokenizer, source
        chat = conversations(tokenizer) if source == BUILTIN else None
        self._pieces = list(_pieces([chat] if chat else read_documents(source)))
        self._encoded: dict[int, list[int]] = {}  # by the piece's number

    def draw(self, *, samples: int, seqlen: int, seed: int, or_fewer: bool = False) -> Tensor:
        """Draw windows of the text at random.

        Every placement of `samples` windows that do not overlap is equally likely. Windows come in
        the order of the text. If the tokenizer starts texts with a beginning-of-text token, every
        window starts with it and has seqlen - 1 tokens of text. If it puts texts between a
        classifier token and a separator, as for BERT, every window is between them. This is how the
        model is used, and models with such tokens treat these positions unlike all others.

        If the text is longer than four times the draw, pieces of it are chosen at random and put
        back into their order. The same tokenizer, source, arguments and version of NumPy give the
        same windows. No global random state is used.

        Args:
            samples: Number of windows, at least 1.
            seqlen: Tokens per window, at least 2.
            seed: Seed of the draw, at least 0.
            or_fewer: If the text is too short for `samples` windows, draw as many as it has, but
                at least one.

        Returns:
            The windows, int64 [samples, seqlen], on the CPU.

        Raises:
            OptionError: An argument is out of range.
            SourceError: The text is too short.
        """
        if samples < 1 or seqlen < 2 or seed < 0:
            raise OptionError(
                f"found samples={samples}, seqlen={seqlen}, seed={seed}; accepted are samples of "
                f"at least 1, seqlen of at least 2 and seed of at least 0"
            )
        prefix, suffix = _around(self._tokenizer)
        length = seqlen - len(prefix) - len(suffix)
        if length < 1:
            raise OptionError(
                f"seqlen {seqlen} leaves no room for text between the tokens that the tokenizer "
                f"adds; choose {seqlen - length + 1} or more"
            )
        generator = np.random.default_rng(seed)
        tokens = self._pool(_POOL * samples * length, generator)
        if or_fewer:
            samples = max(1, min(samples, len(tokens) // length))
        spare = len(tokens) - samples * length
        if spare < 0:
            raise SourceError(
                f"text {self._source!r} is too short: it has {len(tokens):,} tokens, "
                f"{samples * length:,} are needed for {samples} samples of {length}; use a longer "
                f"text, or a smaller --samples or --seqlen"
            )
        # Draw one place per window out of spare + samples places, then widen each place to a
        # window. This draws uniformly from all placements of windows that do not overlap.
        places = np.sort(generator.choice(spare + samples, samples, replace=False))
        starts = places + np.arange(samples) * (length - 1)
        windows = tokens[starts[:, None] + np.arange(length)]
        first, last = (np.tile(np.array(ids, np.int64), (samples, 1)) for ids in (prefix, suffix))
        return torch.from_numpy(np.concatenate([first, windows, last], axis=1))

    def _pool(
        self, enough: int, generator: np.random.Generator
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Choose pieces at random until they have enough tokens; return these in text order."""
        order = generator.permutation(len(self._pieces)).tolist()
        chosen: list[int] = []
        total = 0
        for first in range(0, len(order), _BATCH):
            batch = order[first : first + _BATCH]
            self._encode(batch)
            chosen += batch
            total += sum(len(self._encoded[i]) for i in batch)
            if total >= enough:
                break
        joined: list[int] = []
        before: int | None = None
        for i in sorted(chosen):
            follows = before is None or (
                i == before + 1 and self._pieces[i][0] == self._pieces[before][0]
            )
            if not follows and self._tokenizer.eos_token_id is not None:
                joined.append(self._tokenizer.eos_token_id)
            joined += self._encoded[i]
            before = i
        return np.array(joined, np.int64)

    def _encode(self, pieces: list[int]) -> None:
        """Tokenise the pieces that have not been tokenised yet."""
        missing = [i for i in pieces if i not in self._encoded]
        texts = [self._pieces[i][1] for i in missing]
        if texts:
            # verbose=False: no warning that a piece is longer than the model's context.
            found = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            self._encoded.update(zip(missing, found, strict=True))


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that the tokenizer puts before and behind every text, in lists.

    They are a beginning-of-text token, or a classifier token and a separator.
    """
    bos = tokenizer.bos_token_id
    first, last = (getattr(tokenizer, name, None) for name in ("cls_token_id", "sep_token_id"))
    if bos is None and (first is None or last is None):
        return [], []
    found = tokenizer("a")["input_ids"]
    if first is not None and last is not None and (found[:1], found[-1:]) == ([first], [last]):
        return [first], [last]
    return ([bos] if bos is not None and found[:1] == [bos] else []), []


def _pieces(documents: list[str]) -> Iterator[tuple[int, str]]:
    """Cut the documents at ends of lines or words; yield pairs (number of the document, piece)."""
    for number, text in enumerate(documents):
        start = 0
        while start < len(text):
            end = start + _PIECE
            if end < len(text):
                # Cut before white space: most tokenizers join a space with the word after it.
                cut = max(text.rfind(white, start + 1, end) for white in " \n")
                end = cut if cut > start else end
            yield number, text[start:end]
            start = end
