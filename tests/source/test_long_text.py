"""Texts longer than what is read of one: in memory, at the cut, and through pipes."""

import itertools
import json
import os
import threading
import tracemalloc
from pathlib import Path

import pytest

from helpers.remarks import Remarks
from spallm_convert import SourceError
from spallm_convert.source import records as records_module
from spallm_convert.source import text as text_module
from spallm_convert.source import text_blocks as blocks_module
from spallm_convert.source.records import json_records
from spallm_convert.source.text import read_documents


@pytest.fixture
def most(monkeypatch):
    """Lower the limits: characters of a text, bytes of a record, bytes of a block."""

    def set_limits(characters, record=1 << 26, block=1 << 20):
        monkeypatch.setattr(text_module, "_MOST_CHARACTERS", characters)
        monkeypatch.setattr(records_module, "_MOST_RECORD_BYTES", record)
        monkeypatch.setattr(blocks_module, "_BLOCK_BYTES", block)

    return set_limits


def memory_of(read):
    tracemalloc.start()
    read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize(
    ("text", "characters", "read"),
    [
        ("one two three", 13, "one two three"),
        ("one two three", 12, "one two"),
        ("one two three", 7, "one two"),
        ("one two three", 6, "one"),
        ("one\ntwo three", 6, "one"),
        ("unbroken", 3, "unb"),
        ("üöäß€", 3, "üöä"),
        ("a\r\nb\rc", 5, "a\nb\nc"),
    ],
)
@pytest.mark.parametrize("block", [1, 2, 5, 100])
def test_a_long_text_is_cut_between_words(write, most, text, characters, read, block):
    most(characters, block=block)
    path, remarks = write("a.txt", text.encode("utf-8-sig")), Remarks()
    assert read_documents(path, remarks) == [read]
    is_cut = len(text.replace("\r\n", "\n")) > characters
    line = f"text {path!r}: only its first {len(read)} characters are used"
    assert remarks.lines == ([line] if is_cut else [])


@pytest.mark.parametrize("block", [1, 3, 7])
def test_the_byte_that_is_not_utf8_is_counted_from_the_start(write, most, block):
    most(1000, block=block)
    for mark in (b"", b"\xef\xbb\xbf"):
        start = mark + "ü€\r\nü".encode()
        with pytest.raises(SourceError, match=rf"not UTF-8 \(byte {len(start)}\), expected text"):
            read_documents(write("a.txt", start + b"\xe9t\xe9"))
    with pytest.raises(SourceError, match=r"not UTF-8 \(byte 3\)"):
        read_documents(write("a.txt", b"cut\xe2\x82"))


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl"])
def test_memory_is_that_of_what_is_read(tmp_path, most, name):
    most(1 << 16, block=1 << 16)
    record = json.dumps({"text": "word " * 2000})
    separator = "\n" if name == "a.jsonl" else ","
    with (tmp_path / name).open("w") as file:
        file.write("[" if name == "a.json" else "")
        file.write(separator.join(itertools.repeat(record, 2000)))
        file.write("]" if name == "a.json" else "")
    size = (tmp_path / name).stat().st_size
    assert size > 19_000_000
    remarks = Remarks()
    assert memory_of(lambda: read_documents(str(tmp_path / name), remarks)) < 2_000_000
    assert len(remarks.lines) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": "%s"}', "a.jsonl, line 2: longer than 65,536 bytes"),
        ("a.json", '[{"text": "x"}, {"text": "%s"}]', "record 1: longer than 65,536 characters"),
        ("a.json", '[{"text": "x"}, [%s', "record 1: longer than 65,536 characters"),
    ],
)
def test_a_record_that_is_too_long_is_refused(write, most, name, content, message):
    most(1 << 26, record=1 << 16, block=1 << 10)
    found = json_records(Path(write(name, content % ("1," * 1_000_000))))
    assert next(found).value == {"text": "x"}

    def fail():
        with pytest.raises(SourceError, match=message):
            next(found)

    assert memory_of(fail) < 3_000_000


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_record_that_takes_far_more_memory_than_its_size_is_refused(write, monkeypatch, name):
    monkeypatch.setattr("spallm_formats.files._MEMORY_CONSTANT", 0)
    costly = f'{{"text": "", "more": [{"[], " * 1_000_000}0]}}'
    path = write(name, f"[{costly}]" if name == "a.json" else costly)

    def fail():
        where = "record 0" if name == "a.json" else "line 1"
        with pytest.raises(SourceError, match=rf"{where}: \S+ bytes of JSON would take about"):
            read_documents(path)

    assert memory_of(fail) < 30_000_000


@pytest.mark.parametrize("block", [1, 2, 3, 50])
def test_a_list_is_parsed_alike_in_blocks_of_any_size(write, most, block):
    most(1000, block=block)
    values = [{"text": 'a "b" ü\\'}, 12345, -1.5e10, [], {}, True, None, "\n", [[1], {"a": [2]}]]
    for text in (json.dumps(values), json.dumps(values, indent=2, ensure_ascii=False)):
        records = list(json_records(Path(write("a.json", text))))
        assert [record.value for record in records] == values
        assert records[3].where.endswith("a.json, record 3")


def test_lines_in_a_json_file_are_read(write):
    """Many tools write one record per line and call the file .json."""
    lines = '{"text": "one"}\n{"text": "two"}\n\n'
    assert read_documents(write("a.json", lines)) == ["one", "two"]
    with pytest.raises(SourceError, match=r"record 1: not JSON \(Expecting value, line 2\)"):
        read_documents(write("a.json", '{"text": "one"}\nno more of it'))


@pytest.mark.parametrize("name", ["text", "text.jsonl"])
def test_a_pipe_is_read(tmp_path, name):
    os.mkfifo(tmp_path / name)
    content = '{"text": "through"}\n' if "json" in name else "through"
    writer = threading.Thread(target=(tmp_path / name).write_text, args=(content,), daemon=True)
    writer.start()
    assert read_documents(str(tmp_path / name)) == ["through"]
    writer.join(10)
