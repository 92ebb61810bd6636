"""The description of a tables-only checkpoint, beside the tables and in their file."""

import json
import struct

import pytest

from spallm_formats import (
    FormatError,
    TablesMetadata,
    TensorSpec,
    build_header,
    header_metadata,
    parse_header,
)

DESCRIBED = TablesMetadata(
    base_model="\u2028 \x1b \u00e9", base_revision=None, fingerprint="ab" * 32
)

AFFINE = TablesMetadata(
    base_model=None, base_revision="main", fingerprint="ab" * 32, base_tables="cd" * 32
)


def test_the_description_survives_the_header(tmp_path):
    specs = [TensorSpec("a", "BF16", (2, 3)), TensorSpec("b", "F32", ())]
    header, offsets = build_header(specs, DESCRIBED.to_header())
    (length,) = struct.unpack("<Q", header[:8])
    assert len(header) == 8 + length
    metadata = header_metadata(header[8:], "tables")
    assert metadata["format"] == "pt"  # transformers wants to know the framework
    assert TablesMetadata.from_header(metadata) == DESCRIBED
    tensors = parse_header(header[8:], tmp_path / "tables", len(header) + 16)
    assert {name: tensor.offset for name, tensor in tensors.items()} == offsets


def test_a_header_without_description_gives_none():
    header, _ = build_header([])
    assert TablesMetadata.from_header(header_metadata(header[8:], "tables")) is None


def test_the_description_survives_json():
    assert TablesMetadata.from_json(json.loads(json.dumps(DESCRIBED.to_json()))) == DESCRIBED


@pytest.mark.parametrize("version", [True, 1.0, "1", None, 0, 3])
def test_only_the_integers_one_and_two_are_known_versions(version):
    document = DESCRIBED.to_json() | {"format_version": version}
    with pytest.raises(FormatError, match=r"^here: format_version is .*, this version of"):
        TablesMetadata.from_json(document, "here")


def test_full_tables_are_described_as_before():
    """Older versions read full tables, and refuse affine numbers by their version."""
    keys = ["format", "format_version", "base_model", "base_revision", "fingerprint"]
    assert list(DESCRIBED.to_json()) == keys
    assert DESCRIBED.to_json()["format_version"] == 1
    assert AFFINE.to_json()["format_version"] == 2


def test_an_affine_description_survives_json():
    read = TablesMetadata.from_json(json.loads(json.dumps(AFFINE.to_json())))
    assert read == AFFINE
    assert read.is_affine
    assert not DESCRIBED.is_affine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "tables"}, "kind is 'tables', expected 'affine' with format_version 2"),
        ({"kind": ["affine"]}, "kind is .'affine'., expected"),
        ({"base_tables": None}, "base_tables is None, expected 64 hexadecimal digits"),
        ({"base_tables": "AB" * 32}, "base_tables is .*, expected 64 hexadecimal digits"),
        ({"format_version": 1}, "(?s)unknown key 'base_tables'.*unknown key 'kind'"),
    ],
)
def test_affine_descriptions_are_checked(change, message):
    with pytest.raises(FormatError, match=message):
        TablesMetadata.from_json(AFFINE.to_json() | change)


def test_every_problem_is_listed():
    document = DESCRIBED.to_json() | {"base_model": 1, "fingerprint": "AB" * 32, "x": 0, "w": 0}
    with pytest.raises(FormatError) as caught:
        TablesMetadata.from_json(document)
    assert len(caught.value.problems) == 4
