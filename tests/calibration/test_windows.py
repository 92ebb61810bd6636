"""Windows of a text: the draw is fair and repeatable, and tokenises only what it needs."""

import json
import random

import numpy as np
import pytest
import torch

from helpers.tiny_tokenizer import tiny_tokenizer
from spallm_convert import OptionError, SourceError
from spallm_convert.calibration import windows
from spallm_convert.calibration.windows import CalibrationText


def words(count):
    return " ".join(str(i) for i in range(count))


def test_windows_are_stretches_of_the_text_that_do_not_overlap(write):
    tokenizer, text = tiny_tokenizer(), words(500)
    drawn = CalibrationText(tokenizer, write("a.txt", text)).draw(samples=20, seqlen=30, seed=3)
    assert drawn.dtype == torch.int64
    assert drawn.shape == (20, 30)
    end = 0
    for row in drawn:
        # Every window of 30 characters occurs once in the numbers from 0 on.
        start = text.index(tokenizer.decode(row))
        assert start >= end
        end = start + 30


def test_as_many_tokens_as_there_are(write):
    source = write("a.txt", "abcdef" * 10)
    drawn = CalibrationText(tiny_tokenizer(), source).draw(samples=6, seqlen=10, seed=0)
    assert drawn.flatten().tolist() == tiny_tokenizer()("abcdef" * 10)["input_ids"]
    with pytest.raises(
        SourceError, match="too short: it has 60 tokens, 70 are needed for 7 samples of 10"
    ):
        CalibrationText(tiny_tokenizer(), source).draw(samples=7, seqlen=10, seed=0)
    fewer = CalibrationText(tiny_tokenizer(), source).draw(
        samples=7, seqlen=10, seed=0, or_fewer=True
    )
    assert torch.equal(fewer, drawn)
    with pytest.raises(SourceError, match="too short: it has 60 tokens, 70 are needed"):
        CalibrationText(tiny_tokenizer(), source).draw(samples=7, seqlen=70, seed=0, or_fewer=True)


def test_every_placement_is_equally_likely(write):
    """Draw two windows of 2 from 6 tokens, which have six placements."""
    source, tokenizer = write("a.txt", "abcdef"), tiny_tokenizer()
    found = {}
    for seed in range(600):
        drawn = CalibrationText(tokenizer, source).draw(samples=2, seqlen=2, seed=seed)
        key = tokenizer.decode(drawn[0]) + " " + tokenizer.decode(drawn[1])
        found[key] = found.get(key, 0) + 1
    assert sorted(found) == ["ab cd", "ab de", "ab ef", "bc de", "bc ef", "cd ef"]
    assert all(70 < count < 130 for count in found.values())


@pytest.mark.parametrize("has_eos", [True, False])
def test_documents_are_joined_by_the_end_of_text(write, has_eos):
    source = write("a.jsonl", "\n".join(json.dumps({"text": text}) for text in ("ab", "cd", "ef")))
    tokenizer = tiny_tokenizer(has_eos=has_eos)
    total = 8 if has_eos else 6
    drawn = CalibrationText(tokenizer, source).draw(samples=1, seqlen=total, seed=0)
    assert tokenizer.decode(drawn[0]) == ("ab</s>cd</s>ef" if has_eos else "abcdef")


def test_a_beginning_of_text_token_starts_every_window(write):
    tokenizer = tiny_tokenizer(adds_bos=True)
    source = write("a.txt", "abcdef" * 10)
    drawn = CalibrationText(tokenizer, source).draw(samples=6, seqlen=11, seed=0)
    assert (drawn[:, 0] == tokenizer.bos_token_id).all()
    assert tokenizer.decode(drawn[:, 1:].flatten()) == "abcdef" * 10


def test_the_seed_decides_and_global_generators_are_left_alone(write):
    source, tokenizer = write("a.txt", words(2000)), tiny_tokenizer()

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    def draw(seed):
        return CalibrationText(tokenizer, source).draw(samples=8, seqlen=16, seed=seed)

    before = states()
    first = draw(0)
    assert states() == before
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))


class Watched:
    """The tiny tokenizer, which also lists the texts that it tokenises."""

    bos_token_id, eos_token_id = None, 1

    def __init__(self, seen):
        self._seen, self._tokenizer = seen, tiny_tokenizer()

    def __call__(self, texts, **options):
        self._seen.extend(texts)
        return self._tokenizer(texts, **options)


def test_of_a_large_text_a_random_part_is_tokenised(write, monkeypatch):
    """Check that pieces come from all parts of the text alike, and stay in its order."""
    monkeypatch.setattr(windows, "_PIECE", 100)
    monkeypatch.setattr(windows, "_BATCH", 2)
    text = words(20_000)
    source, tokenizer = write("a.txt", text), tiny_tokenizer()
    seen = []

    places = []
    for seed in range(40):
        seen.clear()
        drawn = CalibrationText(Watched(seen), source).draw(samples=5, seqlen=20, seed=seed)
        assert 400 <= sum(map(len, seen)) < 800
        assert all(piece in text for piece in seen)
        numbers = " ".join(map(tokenizer.decode, drawn)).replace("</s>", " ").split()
        places += [int(number) for number in numbers if len(number) == 5]
    assert np.histogram(places, bins=4, range=(10_000, 20_000))[0].min() > 0.1 * len(places)
    assert abs(np.mean(places) - 15_000) < 1_000


def test_pieces_make_up_the_text(monkeypatch):
    monkeypatch.setattr(windows, "_PIECE", 50)
    documents = [words(300), "x" * 170, "short", "a\n" + "y" * 120]
    pieces = list(windows._pieces(documents))
    for number, document in enumerate(documents):
        own = [piece for i, piece in pieces if i == number]
        assert "".join(own) == document
        assert all(0 < len(piece) <= 50 for piece in own)
    assert all(piece.startswith(" ") for i, piece in pieces[1:] if i == 0)


@pytest.mark.parametrize(
    "numbers", [(0, 8, 0), (1, 1, 0), (1, 8, -1)], ids=["samples", "seqlen", "seed"]
)
def test_unusable_numbers(numbers):
    samples, seqlen, seed = numbers
    with pytest.raises(OptionError, match=f"found samples={samples}, seqlen={seqlen}, seed={seed}"):
        CalibrationText(tiny_tokenizer(), "builtin").draw(samples=samples, seqlen=seqlen, seed=seed)


def test_what_was_tokenised_for_one_draw_serves_the_next(write, monkeypatch):
    monkeypatch.setattr(windows, "_PIECE", 100)
    monkeypatch.setattr(windows, "_BATCH", 2)
    source, tokenizer = write("a.txt", words(5_000)), tiny_tokenizer()
    seen = []

    text = CalibrationText(Watched(seen), source)
    text.draw(samples=5, seqlen=20, seed=0)
    few = len(seen)
    drawn = text.draw(samples=50, seqlen=20, seed=0)
    assert 0 < few < len(seen) == len(set(seen))
    anew = CalibrationText(tokenizer, source).draw(samples=50, seqlen=20, seed=0)
    assert torch.equal(drawn, anew)
