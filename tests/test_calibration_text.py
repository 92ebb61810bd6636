"""Text for calibration: every kind of source, and a draw that is fair, repeatable and local."""

import json
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.tiny_tokenizer import tiny_tokenizer
from spallm_convert import OptionError, SourceError
from spallm_convert.calibration import text as text_module
from spallm_convert.calibration.text import calibration_tokens, english_text, read_documents


@pytest.fixture
def write(tmp_path):
    def file(name, content):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8")
        return str(path)

    return file


def lines(*records):
    return "\n".join(map(json.dumps, records))


def test_builtin_is_english_prose():
    assert read_documents("builtin") == [english_text()]
    assert len(english_text()) > 100_000


def test_a_text_file_is_one_document(write):
    assert read_documents(write("a.txt", "one\n\ntwo ü\n")) == ["one\n\ntwo ü\n"]
    assert read_documents(write("b.md", "\ufeffmarked")) == ["marked"]


RECORDS = [
    ({"text": "plain", "id": 7}, "plain"),
    (
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        "Q\n\nA",
    ),
    ({"messages": [{"content": [{"type": "text", "text": "Q"}, {"type": "image"}]}]}, "Q"),
    ({"instruction": "I", "input": "", "output": "O"}, "I\n\nO"),
    ({"instruction": "I", "input": "X", "output": None}, "I\n\nX"),
    ({"text": "half \ud83d a pair"}, "half ? a pair"),
]


@pytest.mark.parametrize(("record", "document"), RECORDS)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_records(write, record, document, suffix):
    empty = {"text": " \n"}
    content = json.dumps([record, empty]) if suffix == "json" else lines(record, empty) + "\n\n"
    assert read_documents(write(f"a.{suffix}", content)) == [document]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r"a.txt: not UTF-8 \(byte 3\)"),
        ("a.txt", " \n ", "there is no text in it"),
        ("a.json", "[]", "there is no text in it"),
        ("a.json", "{", "a.json: not JSON"),
        ("a.json", "[" * 100_000, "a.json: not JSON"),
        ("a.json", '{"text": "x"}', "a value of type dict, expected a list of records"),
        ("a.json", '["x"]', "record 0: a value of type str, expected an object with 'text'"),
        ("a.jsonl", '{"text": "x"}\n{"text"', "a.jsonl, line 2: not JSON"),
        (
            "a.jsonl",
            '{"content": "x", "id": 1}',
            "line 1: found the keys 'content', 'id', expected 'text', 'messages' or 'instruction'",
        ),
        ("a.jsonl", "{}", "found the keys none, expected"),
        ("a.jsonl", '{"text": ["x"]}', "line 1: a value of type list where text is expected"),
        ("a.jsonl", '{"messages": "x"}', "'messages' must be a list of objects with 'content'"),
        ("a.jsonl", '{"messages": [{"role": "x"}]}', "must be a list of objects with 'content'"),
        ("a.jsonl", '{"messages": [{"content": 3}]}', "a value of type int where text is expected"),
    ],
)
def test_unusable_files(write, name, content, message):
    with pytest.raises(SourceError, match=message):
        read_documents(write(name, content))


def test_what_is_no_source(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match=r"a folder; accepted are 'builtin', a text, .json"):
        read_documents(str(tmp_path))
    for missing in ("nowhere.txt", "some/nowhere.jsonl", "../x/y/z", "wiki text"):
        with pytest.raises(SourceError, match="no such file; accepted are 'builtin'"):
            read_documents(missing)
    with pytest.raises(SourceError, match=r"no such file, and .*: pip install datasets"):
        read_documents("org/name:test")


def fake_datasets(monkeypatch, load):
    calls = []

    def load_dataset(*names, **options):
        calls.append((names, options))
        return load()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_a_dataset_is_streamed_until_there_is_enough(monkeypatch):
    read = []

    def endless():
        while True:
            read.append(1)
            yield {"text": "x" * 100}

    calls = fake_datasets(monkeypatch, endless)
    monkeypatch.setattr(text_module, "_HUB_CHARACTERS", 450)
    assert read_documents("org/name") == ["x" * 100] * 5
    assert len(read) == 5
    read_documents("org/name:test")
    read_documents("org/name:config-1:test")
    assert calls == [
        (("org/name",), {"split": "train", "streaming": True}),
        (("org/name",), {"split": "test", "streaming": True}),
        (("org/name", "config-1"), {"split": "test", "streaming": True}),
    ]


def test_a_dataset_that_cannot_be_had(monkeypatch):
    def missing():
        raise FileNotFoundError("org/name is not on\nthe Hub")

    fake_datasets(monkeypatch, missing)
    with pytest.raises(SourceError, match=r"no dataset either \(org/name is not on the Hub\)"):
        read_documents("org/name")
    fake_datasets(monkeypatch, lambda: [{"document": "x"}])
    with pytest.raises(SourceError, match="org/name, record 0: found the keys 'document'"):
        read_documents("org/name")


def words(count):
    return " ".join(str(i) for i in range(count))


def test_windows_are_stretches_of_the_text_that_do_not_overlap(write):
    tokenizer, text = tiny_tokenizer(), words(500)
    drawn = calibration_tokens(tokenizer, write("a.txt", text), samples=20, seqlen=30, seed=3)
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
    drawn = calibration_tokens(tiny_tokenizer(), source, samples=6, seqlen=10, seed=0)
    assert drawn.flatten().tolist() == tiny_tokenizer()("abcdef" * 10)["input_ids"]
    with pytest.raises(
        SourceError, match="too short: it has 60 tokens, 70 are needed for 7 samples of 10"
    ):
        calibration_tokens(tiny_tokenizer(), source, samples=7, seqlen=10, seed=0)
    fewer = calibration_tokens(
        tiny_tokenizer(), source, samples=7, seqlen=10, seed=0, or_fewer=True
    )
    assert torch.equal(fewer, drawn)
    with pytest.raises(SourceError, match="too short: it has 60 tokens, 70 are needed"):
        calibration_tokens(tiny_tokenizer(), source, samples=7, seqlen=70, seed=0, or_fewer=True)


def test_every_placement_is_equally_likely(write):
    """Two windows of 2 in 6 tokens: six placements."""
    source, tokenizer = write("a.txt", "abcdef"), tiny_tokenizer()
    found = {}
    for seed in range(600):
        drawn = calibration_tokens(tokenizer, source, samples=2, seqlen=2, seed=seed)
        key = tokenizer.decode(drawn[0]) + " " + tokenizer.decode(drawn[1])
        found[key] = found.get(key, 0) + 1
    assert sorted(found) == ["ab cd", "ab de", "ab ef", "bc de", "bc ef", "cd ef"]
    assert all(70 < count < 130 for count in found.values())


@pytest.mark.parametrize("has_eos", [True, False])
def test_documents_are_joined_by_the_end_of_text(write, has_eos):
    source = write("a.jsonl", lines({"text": "ab"}, {"text": "cd"}, {"text": "ef"}))
    tokenizer = tiny_tokenizer(has_eos=has_eos)
    total = 8 if has_eos else 6
    drawn = calibration_tokens(tokenizer, source, samples=1, seqlen=total, seed=0)
    assert tokenizer.decode(drawn[0]) == ("ab</s>cd</s>ef" if has_eos else "abcdef")


def test_a_beginning_of_text_token_starts_every_window(write):
    tokenizer = tiny_tokenizer(adds_bos=True)
    source = write("a.txt", "abcdef" * 10)
    drawn = calibration_tokens(tokenizer, source, samples=6, seqlen=11, seed=0)
    assert (drawn[:, 0] == tokenizer.bos_token_id).all()
    assert tokenizer.decode(drawn[:, 1:].flatten()) == "abcdef" * 10


def test_the_seed_decides_and_global_generators_are_left_alone(write):
    source, tokenizer = write("a.txt", words(2000)), tiny_tokenizer()

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    def draw(seed):
        return calibration_tokens(tokenizer, source, samples=8, seqlen=16, seed=seed)

    before = states()
    first = draw(0)
    assert states() == before
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))


def test_of_a_large_text_a_random_part_is_tokenised(write, monkeypatch):
    """Pieces of all of the text are chosen alike, and stay in its order."""
    monkeypatch.setattr(text_module, "_PIECE", 100)
    monkeypatch.setattr(text_module, "_BATCH", 2)
    text = words(20_000)
    source, tokenizer = write("a.txt", text), tiny_tokenizer()
    seen = []

    class Watched:
        bos_token_id, eos_token_id = None, 1

        def __call__(self, texts, **options):
            seen.extend(texts)
            return tokenizer(texts, **options)

    places = []
    for seed in range(40):
        seen.clear()
        drawn = calibration_tokens(Watched(), source, samples=5, seqlen=20, seed=seed)
        assert 400 <= sum(map(len, seen)) < 800
        assert all(piece in text for piece in seen)
        numbers = " ".join(map(tokenizer.decode, drawn)).replace("</s>", " ").split()
        places += [int(number) for number in numbers if len(number) == 5]
    assert np.histogram(places, bins=4, range=(10_000, 20_000))[0].min() > 0.1 * len(places)
    assert abs(np.mean(places) - 15_000) < 1_000


def test_pieces_make_up_the_text(monkeypatch):
    monkeypatch.setattr(text_module, "_PIECE", 50)
    documents = [words(300), "x" * 170, "short", "a\n" + "y" * 120]
    pieces = list(text_module._pieces(documents))
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
        calibration_tokens(tiny_tokenizer(), "builtin", samples=samples, seqlen=seqlen, seed=seed)
