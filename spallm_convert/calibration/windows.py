"""Windows of a text, in tokens, drawn at random to calibrate with.

Reading is cheap beside tokenising, so a source is read first, but only as much of it is tokenised
as a fair draw needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spallm_convert.errors import OptionError, SourceError
from spallm_convert.source.text import read_documents

#: Long documents are tokenised in pieces of this many characters, some 16 k tokens, ...
_PIECE = 1 << 16
#: ... so many pieces at a time, ...
_BATCH = 64
#: ... until there are this many times the tokens that are drawn.
_POOL = 4


class CalibrationText:
    """A source's text (`text.read_documents`), read once, however often windows are drawn.

    Documents are tokenised without special tokens, in pieces of at most 64 Ki characters, and
    joined, with the tokenizer's end-of-text token between them where it has one. Raises SourceError
    for a text that cannot be read.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._tokenizer, self._source = tokenizer, source
        self._pieces = list(_pieces(read_documents(source)))
        self._encoded: dict[int, list[int]] = {}  # by the piece's number

    def draw(self, *, samples: int, seqlen: int, seed: int, or_fewer: bool = False) -> Tensor:
        """Windows of the text, int64 [samples, seqlen], on the CPU.

        or_fewer: of a text that is too short for so many, take as many as it has, but one at least.

        Every placement of `samples` windows that do not overlap is equally likely; they come in the
        order of the text. Where the tokenizer puts a beginning-of-text token before what it
        encodes, every window starts with it (and has seqlen - 1 tokens of text), since that is what
        the model sees in use: models that know such a token treat the first place of a sequence
        unlike all others.

        Of more text than four times what is drawn, pieces are chosen at random and put back into
        their order. Same tokenizer, source, numbers and version of NumPy give the same windows; the
        generator is seeded with `seed`, no global one is touched. Raises OptionError for numbers
        that cannot be used, SourceError for a text that is too short.
        """
        if samples < 1 or seqlen < 2 or seed < 0:
            raise OptionError(
                f"calibration takes at least 1 sample of at least 2 tokens and a seed of at least "
                f"0, found samples={samples}, seqlen={seqlen}, seed={seed}"
            )
        prefix = _beginning(self._tokenizer)
        length = seqlen - len(prefix)
        generator = np.random.default_rng(seed)
        tokens = self._pool(_POOL * samples * length, generator)
        if or_fewer:
            samples = max(1, min(samples, len(tokens) // length))
        spare = len(tokens) - samples * length
        if spare < 0:
            raise SourceError(
                f"text {self._source!r} is too short: it has {len(tokens):,} tokens, "
                f"{samples * length:,} are needed for {samples} samples of {length}"
            )
        # Choosing among spare + samples places, and widening each to a window, is choosing among
        # all placements of windows that do not overlap.
        places = np.sort(generator.choice(spare + samples, samples, replace=False))
        starts = places + np.arange(samples) * (length - 1)
        windows = tokens[starts[:, None] + np.arange(length)]
        first = np.tile(np.array(prefix, np.int64), (samples, 1))
        return torch.from_numpy(np.concatenate([first, windows], axis=1))

    def _pool(
        self, enough: int, generator: np.random.Generator
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens of pieces chosen at random until there are enough, int64 [n], in their order."""
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
        missing = [i for i in pieces if i not in self._encoded]
        texts = [self._pieces[i][1] for i in missing]
        if texts:
            # verbose=False: no remark that this is longer than the model's context.
            found = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            self._encoded.update(zip(missing, found, strict=True))


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
