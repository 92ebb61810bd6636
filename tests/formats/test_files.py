"""Files that may be anything: pipes, git-lfs pointers, JSON that wants gigabytes."""

import contextlib
import json
import os
import resource
import socket
import struct

import pytest

from helpers.children import in_child
from spallm_formats import (
    FormatError,
    SketchedCheckpoint,
    load_json,
    read_header,
    read_json,
    sha256,
)
from spallm_formats.files import MAX_JSON_BYTES, read_small

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.mark.parametrize("read", [read_header, read_json, read_small, sha256])
def test_only_regular_files_are_read(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name, kind in (
        ("pipe", "a pipe"),
        ("link", "a pipe"),
        ("folder", "a folder"),
        ("device", "a device"),
    ):
        with pytest.raises(FormatError, match=f"{name}: {kind}, expected a regular file"):
            read(tmp_path / name)


def test_a_socket_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(FormatError, match="socket: a socket, expected a regular file"):
            read_small(tmp_path / "socket")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_a_checkpoint_does_not_wait(tmp_path, name):
    config = {"quantization_config": {"quant_method": "spallm", "format_version": 1, "bits": 0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(FormatError):
        SketchedCheckpoint.open(tmp_path)


@pytest.mark.parametrize("read", [read_header, read_json])
def test_a_pointer_of_git_lfs_says_how_to_get_the_file(tmp_path, read):
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(FormatError, match=r"git-lfs pointer .* `git lfs pull`"):
        read(tmp_path / "model.safetensors")


def test_json_has_a_limit(tmp_path):
    (tmp_path / "config.json").write_bytes(b"{}" + b" " * MAX_JSON_BYTES)
    with pytest.raises(FormatError, match=r"config.json: larger than 33,554,432 bytes"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("piece", ["{},", '{"a":0},', "[[]],", '{"a":{}},', '"ab",', "300,"])
def test_json_takes_memory_in_proportion_to_its_size(piece):
    text = b"[" + piece.encode() * (6_000_000 // len(piece)) + b"0]"

    def grown():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with contextlib.suppress(FormatError):
            load_json(text, "x")
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10

    assert in_child(grown) < 16 * len(text)


def test_json_of_the_largest_models_is_read():
    """384 experts in 60 layers, three matrices each, two tensors per matrix."""
    names = [
        f"model.layers.{60 * i // 69120}.mlp.experts.{i % 384}.down_proj" for i in range(69120)
    ]
    shape = {"in_features": 7168, "out_features": 2048, "bits": 4, "groups_per_row": 4}
    modules = {f"{name}.{i}": shape for i, name in enumerate(names)}
    index = {
        f"{name}.{i}.weight_table": "model-00001-of-00163.safetensors"
        for i, name in enumerate(names * 2)
    }
    header = {
        name: {"dtype": "BF16", "shape": [2048, 4, 16], "data_offsets": [0, 262144]}
        for name in index
    }
    for document in ({"modules": modules}, {"weight_map": index}, header):
        text = json.dumps(document, indent=2).encode()
        assert len(text) < MAX_JSON_BYTES
        assert load_json(text, "x") == document


@pytest.mark.parametrize(
    "text", [rb'{"a": "\ud800"}', rb'{"\udfff": 1}', rb'["\ud83d"]', rb'"\uDC00\uD800"']
)
def test_halves_of_surrogate_pairs_are_refused(text):
    with pytest.raises(FormatError, match="not valid JSON"):
        load_json(text, "x")
    assert load_json(rb'"\ud83d\ude00"', "x") == "\N{GRINNING FACE}"


def header_file(path, shape, data_offsets=(0, 8)):
    text = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": data_offsets}})
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(8))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([1] * 65, "65 dimensions, at most 64"),
        ([2**62, 2**62, 0], "2\\^63 elements or more"),
        ([10**4000], "2\\^63 elements or more"),
        ([2**32] * 400_000, "400000 dimensions, at most 64"),
    ],
)
def test_shapes_have_bounds(tmp_path, shape, message):
    header_file(tmp_path / "x.safetensors", shape)
    with pytest.raises(FormatError, match=message) as caught:
        read_header(tmp_path / "x.safetensors")
    assert len(str(caught.value)) < 300
