"""How often a conversion reads its source: headers are parsed once, files are hashed once."""

import hashlib
from collections import Counter
from pathlib import Path

import pytest

from helpers.calibration import options
from spallm_convert import Report, SketchConfig, convert
from spallm_formats import files, reader


@pytest.fixture
def passes(monkeypatch):
    """Counts of whole passes over files, by kind and path."""
    found = Counter()
    read_header, file_digest = reader.read_header, hashlib.file_digest
    open_regular, read_bytes = files.open_regular, Path.read_bytes
    opened = {}

    def count_header(path):
        found["header", path] += 1
        return read_header(path)

    def count_open(path):
        file = open_regular(path)
        opened[file.fileno()] = path
        found["read", path] += 1
        return file

    def count_digest(file, digest):
        path = opened[file.fileno()]
        found["read", path] -= 1
        found["hash", path] += 1
        return file_digest(file, digest)

    def count_bytes(path):
        found["read", path] += 1
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", count_bytes)
    monkeypatch.setattr(reader, "read_header", count_header)
    monkeypatch.setattr(hashlib, "file_digest", count_digest)
    monkeypatch.setattr(files, "open_regular", count_open)
    return found


def check_weights(passes, source):
    weights = sorted(source.glob("*.safetensors"))
    for kind in ("header", "hash"):
        assert {path: passes[kind, path] for path in weights} == dict.fromkeys(weights, 1)


def check(passes, source, output):
    check_weights(passes, source)
    small = [path for path in source.iterdir() if path.suffix in {".json", ".jinja"}]
    assert all(passes["hash", path] <= 1 for path in small)
    # The config for the model and for the names of its code, a look for git-lfs pointers, a copy.
    assert all(passes["read", path] <= 3 for path in small)
    assert passes["read", output / "conversion.json"] == 0


def test_a_conversion_reads_each_header_and_hashes_each_file_once(sharded_llama, tmp_path, passes):
    report = convert(
        sharded_llama.folder, tmp_path / "out", SketchConfig(effort="fast", max_shard_size="40KB")
    )
    check(passes, sharded_llama.folder.resolve(), tmp_path / "out")
    assert passes["read", sharded_llama.folder.resolve() / "model.safetensors.index.json"] == 1
    assert report.document == Report.read(tmp_path / "out").document


def test_so_does_a_calibrated_conversion(source, text, tmp_path, passes):
    report = convert(source, tmp_path / "out", options(text, heal=2))
    check(passes, source.resolve(), tmp_path / "out")
    assert report.document == Report.read(tmp_path / "out").document


def test_so_does_resuming_what_is_finished(sharded_llama, tmp_path, passes):
    first = convert(sharded_llama.folder, tmp_path / "out")
    passes.clear()
    again = convert(sharded_llama.folder, tmp_path / "out", resume=True)
    check_weights(passes, sharded_llama.folder.resolve())
    assert passes["read", tmp_path / "out/conversion.json"] == 1
    assert again.document == first.document
