"""Tables-only checkpoints on disk: what is refused, what is replaced, and older ones."""

import copy
import errno
import json
import os
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.tiny_models import save_tiny_llama
from helpers.tuning import logits, train
from spallm_convert import (
    FormatError,
    OptionError,
    SketchConfig,
    SourceError,
    convert,
    load_sketched,
    load_tables,
    save_tables,
    set_trainable,
    table_sets,
)
from spallm_formats import TABLES_FILE, TABLES_METADATA_FILE


@pytest.fixture
def model(sketched_llama):
    return load_sketched(sketched_llama)


def rewrite(folder, tensors):
    """Write other tensors with the description that is beside them."""
    save_file(tensors, folder / TABLES_FILE, metadata={"format": "pt"})


def describe(folder, text, *, inside):
    """Write a description, in the file of tensors or beside it as the first versions did."""
    metadata = {"sketch_tables": text} if inside else {"format": "pt"}
    save_file(load_file(folder / TABLES_FILE), folder / TABLES_FILE, metadata=metadata)
    if not inside:
        (folder / TABLES_METADATA_FILE).write_text(text)


def test_the_wrong_base_is_refused_and_the_model_left_as_it_was(model, tmp_path):
    other = save_tiny_llama(tmp_path / "other", rms_norm_eps=1e-5, intermediate_size=192)
    convert(other.folder, tmp_path / "base", SketchConfig(effort="fast", groups_per_row=2))
    save_tables(load_sketched(tmp_path / "base"), tmp_path / "tuned")
    before = logits(model)
    with pytest.raises(
        FormatError, match=r"made for .*base with the index maps \w{12}, but this model has"
    ):
        load_tables(model, tmp_path / "tuned")
    assert table_sets(model) == ["base"]
    assert torch.equal(logits(model), before)


def test_every_problem_of_a_tables_file_is_listed(model, tmp_path):
    saved = save_tables(model, tmp_path / "tuned")
    tensors = load_file(saved / TABLES_FILE)
    names = sorted(tensors)
    del tensors[names[0]]
    tensors[names[1]] = tensors[names[1]][:1]
    tensors[names[2]] = tensors[names[2]].to(torch.float8_e4m3fn)
    tensors[names[3]] = tensors[names[3]].double()
    tensors["model.extra"] = torch.zeros(1)
    rewrite(saved, tensors)
    with pytest.raises(FormatError) as caught:
        load_tables(model, saved)
    expected = [
        f"{names[0]} is missing",
        f"{names[1]} has the shape [1, ",
        f"{names[2]} is F8_E4M3, expected one of BF16, F16, F32, F64",
        "tables have several dtypes, expected one: BF16, F64, F8_E4M3",
        "'model.extra': the model has no such parameter",
    ]
    assert len(caught.value.problems) == len(expected)
    for problem in expected:
        assert any(problem in text for text in caught.value.problems)
    assert table_sets(model) == ["base"]


def test_values_that_are_not_finite_are_refused(model, tmp_path):
    saved = save_tables(model, tmp_path / "tuned")
    tensors = load_file(saved / TABLES_FILE)
    name = sorted(tensors)[2]
    tensors[name][0, 0, 0] = torch.nan
    rewrite(saved, tensors)
    with pytest.raises(FormatError, match=f"{name} has values that are not finite"):
        load_tables(model, saved)


CHANGES = [
    ({"format": "other"}, "format is 'other', expected 'spallm-tables'"),
    ({"format_version": 3}, "format_version is 3, this version of spallm-convert reads 1 and 2"),
    ({"format_version": True}, "format_version is True"),
    ({"fingerprint": "short"}, "fingerprint is 'short', expected 64 hexadecimal digits"),
    ({"base_model": 3}, "base_model is 3, expected text"),
    ({"base_model": [[[]]]}, "base_model is .*, expected text"),
    ({"surprise": 1}, "unknown key 'surprise'"),
]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_damaged_description_is_refused(model, tmp_path, change, message, inside):
    saved = save_tables(model, tmp_path / "tuned")
    document = json.loads((saved / TABLES_METADATA_FILE).read_text()) | change
    describe(saved, json.dumps(document), inside=inside)
    with pytest.raises(FormatError, match=message):
        load_tables(model, saved)


HOSTILE = {
    "empty": "",
    "a list": "[]",
    "a number": "7",
    "not JSON": "{",
    "deep": "[" * 100_000,
    "deep below a key": '{"format": ' + "[" * 900 + "]" * 900 + "}",
    "huge": '{"format": "' + "x" * 100_000 + '"}',
    "a huge number": '{"format": "spallm-tables", "format_version": ' + "9" * 5000 + "}",
    "lone surrogate": '{"format": "\\ud800"}',
    "not a number": '{"format": "spallm-tables", "format_version": NaN}',
    "repeated keys": '{"format": "spallm-tables", "format": "spallm-tables"}',
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_description_is_refused_in_a_short_line(model, tmp_path, text, inside):
    saved = save_tables(model, tmp_path / "tuned")
    describe(saved, text, inside=inside)
    with pytest.raises(FormatError) as caught:
        load_tables(model, saved)
    str(caught.value).encode()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert table_sets(model) == ["base"]


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS = {
    "not an object": b"[]",
    "repeated tensor": b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' * 2,
    "long name": json.dumps({"x" * 300: TENSOR}).encode(),
    "control characters": json.dumps({"\x1b[2J": TENSOR}).encode(),
    "lone surrogate": b'{"\\ud800": ' + json.dumps(TENSOR).encode() + b"}",
    "unknown dtype": json.dumps({"a": TENSOR | {"dtype": "F4"}}).encode(),
    "metadata not text": b'{"__metadata__": {"sketch_tables": 1}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_hostile_header_is_refused_in_a_short_line(model, tmp_path, header):
    saved = save_tables(model, tmp_path / "tuned")
    (saved / TABLES_FILE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(FormatError) as caught:
        load_tables(model, saved)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("name", [TABLES_FILE, TABLES_METADATA_FILE])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_not_a_file_is_refused(model, tmp_path, name, make):
    saved = save_tables(model, tmp_path / "tuned")
    describe(saved, (saved / TABLES_METADATA_FILE).read_text(), inside=False)
    (saved / name).unlink()
    make(saved / name)
    with pytest.raises(FormatError, match=f"{name}: a (pipe|folder), expected a regular file"):
        load_tables(model, saved)
    with pytest.raises(OptionError, match=f"{name} is not a file, so tables cannot be saved"):
        save_tables(model, saved, overwrite=True)


def test_links_are_replaced_and_not_followed(model, tmp_path):
    saved = save_tables(model, tmp_path / "tuned")
    victims = []
    for name in (TABLES_FILE, TABLES_METADATA_FILE):
        for path in (saved / name, saved / f"{name}.tmp"):
            victims.append(tmp_path / f"victim of {path.name}")
            victims[-1].write_text("theirs")
            path.unlink(missing_ok=True)
            path.symlink_to(victims[-1])
    save_tables(model, saved, overwrite=True)
    assert {victim.read_text() for victim in victims} == {"theirs"}
    assert sorted(path.name for path in saved.iterdir()) == [TABLES_METADATA_FILE, TABLES_FILE]
    assert not any(path.is_symlink() for path in saved.iterdir())
    load_tables(model, saved)


def test_a_failed_write_leaves_what_was_there(model, tmp_path, monkeypatch):
    saved = save_tables(model, tmp_path / "tuned")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    train(model)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_tables(model, saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_the_description_in_the_file_counts(model, tmp_path):
    saved = save_tables(model, tmp_path / "tuned")
    described = saved / TABLES_METADATA_FILE
    described.write_text(described.read_text().replace('"spallm-tables"', '"stale"'))
    load_tables(model, saved)
    described.unlink()
    load_tables(model, saved)
    with pytest.raises(OptionError, match="already holds sketch tables"):
        save_tables(model, saved)


def test_tables_of_the_first_versions_load(model, tmp_path):
    saved = save_tables(model, tmp_path / "tuned")
    described = (saved / TABLES_METADATA_FILE).read_text()
    describe(saved, described, inside=False)
    load_tables(model, saved)
    (saved / TABLES_METADATA_FILE).unlink()
    with pytest.raises(FormatError, match=r"does not say which base it is for, and sketch_tables"):
        load_tables(model, saved)


def test_equal_tables_are_equal_files_that_safetensors_reads(model, tmp_path):
    set_trainable(model, norms=True, dtype=torch.float32)
    first, second = (save_tables(model, tmp_path / name) for name in ("first", "second"))
    data = (first / TABLES_FILE).read_bytes()
    assert data == (second / TABLES_FILE).read_bytes()
    found = load_file(first / TABLES_FILE)
    assert {value.dtype for value in found.values()} == {torch.bfloat16, torch.float32}
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in found.items())
    with safe_open(first / TABLES_FILE, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        described = json.loads(file.metadata()["sketch_tables"])
    assert described == json.loads((first / TABLES_METADATA_FILE).read_text())


def test_folders_without_tables_are_refused(model, sketched_llama, tmp_path):
    with pytest.raises(SourceError, match="no such folder"):
        load_tables(model, tmp_path / "nothing")
    with pytest.raises(
        FormatError, match=r"holds no sketch tables: sketch_tables\.safetensors is missing"
    ):
        load_tables(model, sketched_llama)
    saved = save_tables(model, tmp_path / "tuned")
    (saved / TABLES_FILE).write_bytes(b"short")
    with pytest.raises(FormatError, match="5 bytes are too few for a safetensors file"):
        load_tables(model, saved)
    with pytest.raises(SourceError, match=r"no such folder: 'x+"):
        load_tables(model, "x" * 300)
    with pytest.raises(OptionError, match="is a file, expected a folder"):
        save_tables(model, saved / TABLES_FILE)


def test_nothing_is_overwritten_unasked(model, tmp_path):
    saved = save_tables(model, tmp_path / "tuned")
    with pytest.raises(OptionError, match="already holds sketch tables; overwrite=True replaces"):
        save_tables(model, saved)
    train(model)
    save_tables(model, saved, overwrite=True)
    live = copy.deepcopy(model)
    load_tables(live, saved)
    assert torch.equal(logits(live), logits(model))
