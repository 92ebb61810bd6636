"""Write the hostile checkpoints: python formats/hostile/make.py

Each is the golden 3-bit checkpoint with one thing broken. `error.txt` holds a part of the message
that a reader must give.
"""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent.parent / "golden" / "cluster-3bit"
MODULE = "model.layers.0.mlp.up_proj"
WEIGHT, TABLE, NORM = MODULE + ".weight", MODULE + ".weight_table", "model.norm.weight"

Header = dict[str, Any]


def split(data: bytes) -> tuple[Header, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Header | str, body: bytes) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    return struct.pack("<Q", len(text.encode())) + text.encode() + body


def with_header(change: Callable[[Header], object]) -> bytes:
    header, body = split((GOLDEN / "model.safetensors").read_bytes())
    change(header)
    return join(header, body)


def with_config(change: Callable[[Header], object]) -> str:
    config = json.loads((GOLDEN / "config.json").read_text())
    change(config["quantization_config"])
    return json.dumps(config)


def index(weight_map: dict[str, str]) -> str:
    return json.dumps({"metadata": {}, "weight_map": weight_map})


def cases() -> dict[str, tuple[str, dict[str, bytes | str | None]]]:
    """Return, by name, the expected error and the files to replace (None removes a file)."""
    data = (GOLDEN / "model.safetensors").read_bytes()
    header, body = split(data)
    repeated = json.dumps(header)[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}'
    everything = {WEIGHT: "model-00001-of-00001.safetensors"}
    in_file = "model.safetensors"
    utf16 = json.dumps(header).encode("utf-16")
    return {
        "empty-file": ("0 bytes are too few", {in_file: b""}),
        "header-beyond-file": (
            "its header would have",
            {in_file: struct.pack("<Q", 2**62) + data[8:]},
        ),
        "header-not-json": ("not valid JSON", {in_file: join("{" + " " * 40, body)}),
        "header-not-utf8": (
            "not valid JSON",
            {in_file: struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc"},
        ),
        "header-deep": ("not valid JSON", {in_file: join("[" * 200_00, b"")}),
        "header-list": ("must be a JSON object", {in_file: join("[]", b"")}),
        "header-repeats-key": ("repeated keys", {in_file: join(repeated, body)}),
        "truncated": ("truncated or overlong", {in_file: data[:-7]}),
        "overlong": ("truncated or overlong", {in_file: data + b"\0"}),
        "hole": (
            "no holes, no overlaps",
            {
                in_file: with_header(
                    lambda h: h[TABLE].update(shape=[6, 2, 7], data_offsets=[0, 336])
                )
            },
        ),
        "overlap": (
            "no holes, no overlaps",
            {in_file: with_header(lambda h: h[NORM].update(data_offsets=[380, 400]))},
        ),
        "header-utf16": (
            "not valid JSON",
            {in_file: struct.pack("<Q", len(utf16)) + utf16 + body},
        ),
        "metadata-not-text": (
            "must map names to strings",
            {in_file: with_header(lambda h: h.update(__metadata__={"format": 1}))},
        ),
        "two-kinds-of-files": (
            "found both",
            {"model.safetensors.index.json": index({WEIGHT: in_file})},
        ),
        "size-lies": (
            "its data_offsets span",
            {in_file: with_header(lambda h: h[TABLE].update(shape=[2**20, 2**20, 2**20]))},
        ),
        "size-huge": (
            "shape of 2^63 elements or more",
            {in_file: with_header(lambda h: h[TABLE].update(shape=[10**3000, 10**3000]))},
        ),
        "negative-size": (
            "expected a list of sizes",
            {in_file: with_header(lambda h: h[TABLE].update(shape=[-6, -2, 8]))},
        ),
        "negative-offset": (
            "expected [begin, end]",
            {in_file: with_header(lambda h: h[TABLE].update(data_offsets=[-8, 376]))},
        ),
        "unknown-dtype": (
            "dtype 'F4096'",
            {in_file: with_header(lambda h: h[TABLE].update(dtype="F4096"))},
        ),
        "wrong-table-dtype": (
            "expected BF16",
            {"config.json": with_config(lambda c: c.update(table_dtype="bfloat16"))},
        ),
        "wrong-table-shape": (
            "expected F32 [6, 4, 8]",
            {"config.json": with_config(lambda c: c["modules"][MODULE].update(groups_per_row=4))},
        ),
        "groups-do-not-divide": (
            "does not divide",
            {"config.json": with_config(lambda c: c["modules"][MODULE].update(groups_per_row=3))},
        ),
        "table-missing": (
            "is missing",
            {in_file: with_header(lambda h: h.update({"other": h.pop(TABLE)}))},
        ),
        "table-unlisted": (
            "config.json lists no such module",
            {"config.json": with_config(lambda c: c.update(modules={}, bits=0))},
        ),
        "newer-version": (
            "format_version is 2",
            {"config.json": with_config(lambda c: c.update(format_version=2))},
        ),
        "unknown-key": (
            "unknown key 'act_order'",
            {"config.json": with_config(lambda c: c.update(act_order=True))},
        ),
        "unknown-module-key": (
            "unknown key 'scale'",
            {"config.json": with_config(lambda c: c["modules"][MODULE].update(scale=2))},
        ),
        "bits-as-boolean": (
            "bits is True",
            {"config.json": with_config(lambda c: c["modules"][MODULE].update(bits=True))},
        ),
        "bits-disagree": (
            "the widest module has 3",
            {"config.json": with_config(lambda c: c.update(bits=4))},
        ),
        "no-config": ("no config.json", {"config.json": None}),
        "index-leaves-folder": (
            "expected plain names of safetensors files",
            {
                in_file: None,
                "model.safetensors.index.json": index({WEIGHT: "../model.safetensors"}),
            },
        ),
        "index-shard-missing": (
            "model-00001-of-00001.safetensors is missing",
            {in_file: None, "model.safetensors.index.json": index(everything)},
        ),
        "index-disagrees": (
            "is not in the index",
            {
                in_file: None,
                "model-00001-of-00001.safetensors": data,
                "model.safetensors.index.json": index(everything),
            },
        ),
        "padding-set": ("padding bits", {in_file: data[:-1] + b"\x80"}),
        "table-not-finite": ("NaN or infinite", {in_file: _with_nan(data)}),
    }


def _with_nan(data: bytes) -> bytes:
    header, body = split(data)
    begin = header[TABLE]["data_offsets"][0]
    return data[: len(data) - len(body)] + body[:begin] + b"\0\0\xc0\x7f" + body[begin + 4 :]


if __name__ == "__main__":
    for name, (error, files) in cases().items():
        folder = Path(__file__).parent / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for source in ("config.json", "model.safetensors"):
            shutil.copy(GOLDEN / source, folder)
        for filename, content in files.items():
            if content is None:
                (folder / filename).unlink()
            elif isinstance(content, str):
                (folder / filename).write_text(content)
            else:
                (folder / filename).write_bytes(content)
        (folder / "error.txt").write_text(error + "\n")
