"""Text for calibration: every kind of source."""

import json
import sys
from types import SimpleNamespace

import pytest

from spallm_convert import SourceError
from spallm_convert.source import text as text_module
from spallm_convert.source.text import english_text, read_documents


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
    (
        {
            "messages": [
                {"role": "user", "content": "Q"},
                {"role": "assistant", "tool_calls": [{"id": 1}]},
                {"role": "assistant", "content": None, "function_call": {"name": "f"}},
                {"role": "tool", "content": "A"},
            ]
        },
        "Q\n\nA",
    ),
    ({"instruction": "I", "input": "", "output": "O"}, "I\n\nO"),
    ({"instruction": "I", "input": "X", "output": None}, "I\n\nX"),
    ({"text": "half \ud83d a pair"}, "half ? a pair"),
]


@pytest.mark.parametrize(("record", "document"), RECORDS)
@pytest.mark.parametrize("suffix", ["json", "jsonl", "JSONL", "ndjson", "jsonlines"])
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
        ("a.json", "{", "a.json, record 0: not JSON .*, expected a list of records"),
        ("a.json", b'["caf\xe9"]', r"a.json: not UTF-8 \(byte 5\), expected a list of records"),
        ("a.json", "[" * 100_000, r"a.json, record 0: not JSON \(nested too deeply, line 1\)"),
        ("a.json", '[{"text": "x"},\n', r"record 1: not JSON \(Expecting value, line 2\)"),
        ("a.json", '[{"text": "x"}\n{', r"not JSON \(Expecting ',' or '\]', line 2\)"),
        ("a.json", '[{"text": "x"}] 1', r"not JSON \(Extra data after the list, line 1\)"),
        ("a.json", '{"data": [1]}', "record 0: found the keys 'data', expected 'text'"),
        ("a.json", '["x"]', "record 0: found a value of type str, expected an object with 'text'"),
        ("a.jsonl", '{"text": "x"}\n{"text"', "a.jsonl, line 2: not JSON"),
        (
            "a.jsonl",
            '{"content": "x", "id": 1}',
            "line 1: found the keys 'content', 'id', expected 'text', 'messages' or 'instruction'",
        ),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"a.jsonl, line 1: not UTF-8 \(byte 13\)"),
        ("a.jsonl", "{}", "found the keys none, expected"),
        ("a.jsonl", '{"text": ["x"]}', "line 1: found a value of type list, expected text"),
        ("a.jsonl", '{"messages": "x"}', "'messages' must be a list of objects with 'content'"),
        ("a.jsonl", '{"messages": [{"role": "x"}]}', "must be a list of objects with 'content'"),
        ("a.jsonl", '{"messages": [{"content": 3}]}', "found a value of type int, expected text"),
    ],
)
def test_unusable_files(write, name, content, message):
    with pytest.raises(SourceError, match=message):
        read_documents(write(name, content))


def test_a_file_of_lines_is_read_until_there_is_enough(write, monkeypatch):
    monkeypatch.setattr(text_module, "_MOST_CHARACTERS", 3)
    path = write("a.jsonl", "\ufeff" + lines({"text": "on"}, {"text": "e"}) + "\nno more of it")
    assert read_documents(path) == ["on", "e"]


def test_a_byte_order_mark_is_no_part_of_a_record(write):
    for suffix in ("json", "jsonl"):
        record = '{"text": "x"}'
        path = write(f"a.{suffix}", "\ufeff" + (f"[{record}]" if suffix == "json" else record))
        assert read_documents(path) == ["x"]


def test_what_is_no_source(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match=r"a folder; accepted are 'builtin', a text, .json"):
        read_documents(str(tmp_path))
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="'org/name': a folder; accepted are"):
        read_documents("org/name")
    for missing in ("nowhere.txt", "some/nowhere.jsonl", "../x/y/z", "wiki text"):
        with pytest.raises(SourceError, match="no such file; accepted are 'builtin'"):
            read_documents(missing)
    with pytest.raises(
        SourceError, match=r"no such file, and .*: pip install 'spallm-convert\[datasets\]'"
    ):
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
    monkeypatch.setattr(text_module, "_MOST_CHARACTERS", 450)
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
