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


@pytest.mark.parametrize("version", [True, 1.0, "1", None, 2])
def test_only_the_integer_one_is_a_known_version(version):
    document = DESCRIBED.to_json() | {"format_version": version}
    with pytest.raises(FormatError, match=r"^here: format_version is .*, this version of"):
        TablesMetadata.from_json(document, "here")


def test_every_problem_is_listed():
    document = DESCRIBED.to_json() | {"base_model": 1, "fingerprint": "AB" * 32, "x": 0, "w": 0}
    with pytest.raises(FormatError) as caught:
        TablesMetadata.from_json(document)
    assert len(caught.value.problems) == 4
