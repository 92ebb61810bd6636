"""Write the hostile checkpoints: python formats/hostile/make.py

Each is a golden 3-bit checkpoint with one thing broken. `error.txt` holds a part of the message
that a reader must give.
"""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent.parent / "golden" / "cluster-3bit"
EXPERTS = GOLDEN.parent / "experts-cluster-3bit"
MODULE = "model.layers.0.mlp.up_proj"
WEIGHT, TABLE, NORM = MODULE + ".weight", MODULE + ".weight_table", "model.norm.weight"
FUSED = "model.layers.0.mlp.experts.up_proj"
FUSED_TABLE = FUSED + "_table"
IN_FILE = "model.safetensors"

Header = dict[str, Any]


def split(data: bytes) -> tuple[Header, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Header | str, body: bytes) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    return struct.pack("<Q", len(text.encode())) + text.encode() + body


def with_header(change: Callable[[Header], object], golden: Path = GOLDEN) -> bytes:
    header, body = split((golden / IN_FILE).read_bytes())
    change(header)
    return join(header, body)


def with_config(change: Callable[[Header], object], golden: Path = GOLDEN) -> str:
    config = json.loads((golden / "config.json").read_text())
    change(config["quantization_config"])
    return json.dumps(config)


def index(weight_map: dict[str, str]) -> str:
    return json.dumps({"metadata": {}, "weight_map": weight_map})


Cases = dict[str, tuple[str, dict[str, bytes | str | None]]]


def cases() -> Cases:
    """Return, by name, the expected error and the files to replace (None removes a file)."""
    data = (GOLDEN / "model.safetensors").read_bytes()
    header, body = split(data)
    repeated = json.dumps(header)[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}'
    everything = {WEIGHT: "model-00001-of-00001.safetensors"}
    utf16 = json.dumps(header).encode("utf-16")
    return {
        "empty-file": ("0 bytes are too few", {IN_FILE: b""}),
        "header-beyond-file": (
            "its header would have",
            {IN_FILE: struct.pack("<Q", 2**62) + data[8:]},
        ),
        "header-not-json": ("not valid JSON", {IN_FILE: join("{" + " " * 40, body)}),
        "header-not-utf8": (
            "not valid JSON",
            {IN_FILE: struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc"},
        ),
        "header-deep": ("not valid JSON", {IN_FILE: join("[" * 200_00, b"")}),
        "header-list": ("must be a JSON object", {IN_FILE: join("[]", b"")}),
        "header-repeats-key": ("repeated keys", {IN_FILE: join(repeated, body)}),
        "truncated": ("truncated or overlong", {IN_FILE: data[:-7]}),
        "overlong": ("truncated or overlong", {IN_FILE: data + b"\0"}),
        "hole": (
            "no holes, no overlaps",
            {
                IN_FILE: with_header(
                    lambda h: h[TABLE].update(shape=[6, 2, 7], data_offsets=[0, 336])
                )
            },
        ),
        "overlap": (
            "no holes, no overlaps",
            {IN_FILE: with_header(lambda h: h[NORM].update(data_offsets=[380, 400]))},
        ),
        "header-utf16": (
            "not valid JSON",
            {IN_FILE: struct.pack("<Q", len(utf16)) + utf16 + body},
        ),
        "metadata-not-text": (
            "must map names to strings",
            {IN_FILE: with_header(lambda h: h.update(__metadata__={"format": 1}))},
        ),
        "two-kinds-of-files": (
            "found both",
            {"model.safetensors.index.json": index({WEIGHT: IN_FILE})},
        ),
        "size-lies": (
            "its data_offsets span",
            {IN_FILE: with_header(lambda h: h[TABLE].update(shape=[2**20, 2**20, 2**20]))},
        ),
        "size-huge": (
            "shape of 2^63 elements or more",
            {IN_FILE: with_header(lambda h: h[TABLE].update(shape=[10**3000, 10**3000]))},
        ),
        "negative-size": (
            "expected a list of sizes",
            {IN_FILE: with_header(lambda h: h[TABLE].update(shape=[-6, -2, 8]))},
        ),
        "negative-offset": (
            "expected [begin, end]",
            {IN_FILE: with_header(lambda h: h[TABLE].update(data_offsets=[-8, 376]))},
        ),
        "unknown-dtype": (
            "dtype 'F4096'",
            {IN_FILE: with_header(lambda h: h[TABLE].update(dtype="F4096"))},
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
            {IN_FILE: with_header(lambda h: h.update({"other": h.pop(TABLE)}))},
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
                IN_FILE: None,
                "model.safetensors.index.json": index({WEIGHT: "../model.safetensors"}),
            },
        ),
        "index-shard-missing": (
            "model-00001-of-00001.safetensors is missing",
            {IN_FILE: None, "model.safetensors.index.json": index(everything)},
        ),
        "index-disagrees": (
            "is not in the index",
            {
                IN_FILE: None,
                "model-00001-of-00001.safetensors": data,
                "model.safetensors.index.json": index(everything),
            },
        ),
        "padding-set": ("padding bits", {IN_FILE: data[:-1] + b"\x80"}),
        "table-not-finite": ("NaN or infinite", {IN_FILE: with_nan(data, TABLE, 0)}),
        "transposed-false": (
            "transposed is False, expected true, or no such key",
            {"config.json": with_config(lambda c: c["modules"][MODULE].update(transposed=False))},
        ),
        "shape-huge": (
            "its shape is too large",
            {
                "config.json": with_config(
                    lambda c: c["modules"][MODULE].update(
                        in_features=2**31 - 1, groups_per_row=2**31 - 1, out_features=2**31 - 1
                    )
                )
            },
        ),
    }


def expert_cases() -> Cases:
    """Return the cases that are made from fused experts."""
    data = (EXPERTS / IN_FILE).read_bytes()
    layer = {FUSED + ".weight": FUSED, FUSED + ".weight_table": FUSED_TABLE}
    return with_broken_modules() | {
        "experts-flat": (
            "is U8 [18, 16], expected U8 [3, 6, 16]",
            {IN_FILE: with_header(lambda h: h[FUSED].update(shape=[18, 16]), EXPERTS)},
        ),
        "experts-table-of-other-experts": (
            "is F32 [6, 3, 2, 8], expected F32 [3, 6, 2, 8]",
            {IN_FILE: with_header(lambda h: h[FUSED_TABLE].update(shape=[6, 3, 2, 8]), EXPERTS)},
        ),
        "experts-table-missing": (
            f"{FUSED_TABLE!r} of a sketched module is missing",
            {IN_FILE: with_header(lambda h: h.update({"other": h.pop(FUSED_TABLE)}), EXPERTS)},
        ),
        "experts-named-like-a-layer": (
            "is U8 [3, 6, 16], expected U8 [6, 16]",
            {
                "config.json": with_config(lambda c: c["modules"][FUSED].pop("experts"), EXPERTS),
                IN_FILE: with_header(
                    lambda h: h.update({new: h.pop(old) for new, old in layer.items()}), EXPERTS
                ),
            },
        ),
        "experts-padding-set": ("padding bits", {IN_FILE: with_byte(data, FUSED, 143, 0x80)}),
        "experts-table-not-finite": ("NaN or infinite", {IN_FILE: with_nan(data, FUSED_TABLE, -1)}),
    }


def with_broken_modules() -> Cases:
    """Return the cases of fused experts whose modules in config.json are wrong."""

    def module(**changes: object) -> dict[str, bytes | str | None]:
        return {"config.json": with_config(lambda c: c["modules"][FUSED].update(changes), EXPERTS)}

    def modules(*fused: str, layers: tuple[str, ...] = ()) -> dict[str, bytes | str | None]:
        def change(config: Header) -> None:
            experts = config["modules"][FUSED]
            layer = {key: value for key, value in experts.items() if key != "experts"}
            config["modules"] = dict.fromkeys(fused, experts) | dict.fromkeys(layers, layer)

        return {"config.json": with_config(change, EXPERTS)}

    return {
        "experts-none": ("experts is 0, expected 1 to", module(experts=0)),
        "experts-null": ("experts is None, expected 1 to", module(experts=None)),
        "experts-as-boolean": ("experts is True, expected 1 to", module(experts=True)),
        "experts-too-many": ("expected U8 [4, 6, 16]", module(experts=4)),
        "experts-not-counted": (
            f"'{FUSED}.weight' of a sketched module is missing",
            modules(layers=(FUSED,)),
        ),
        "experts-huge": (
            "its shape is too large",
            module(experts=2**31 - 1, out_features=2**31 - 1),
        ),
        "experts-transposed-as-number": ("transposed is 1, expected true", module(transposed=1)),
        "weight-of-two-modules": (
            f"both have a tensor '{FUSED}.weight'",
            modules(FUSED + ".weight", layers=(FUSED,)),
        ),
        "table-of-two-modules": (
            f"both have a tensor '{FUSED_TABLE}'",
            modules(FUSED, FUSED_TABLE),
        ),
        "experts-with-reserved-name": (
            "the name of fused experts ends in '.weight_table'",
            modules(FUSED + ".weight_table"),
        ),
    }


def with_byte(data: bytes, tensor: str, place: int, value: int) -> bytes:
    """Replace one byte of a tensor."""
    header, body = split(data)
    begin = len(data) - len(body) + header[tensor]["data_offsets"][0] + place
    return data[:begin] + bytes([value]) + data[begin + 1 :]


def with_nan(data: bytes, tensor: str, value: int) -> bytes:
    """Replace one value of a float32 tensor."""
    header, body = split(data)
    at = len(data) - len(body) + header[tensor]["data_offsets"][value < 0] + 4 * value
    return data[:at] + b"\0\0\xc0\x7f" + data[at + 4 :]


def write(golden: Path, name: str, error: str, files: dict[str, bytes | str | None]) -> None:
    folder = Path(__file__).parent / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for source in ("config.json", IN_FILE):
        shutil.copy(golden / source, folder)
    for filename, content in files.items():
        if content is None:
            (folder / filename).unlink()
        elif isinstance(content, str):
            (folder / filename).write_text(content)
        else:
            (folder / filename).write_bytes(content)
    (folder / "error.txt").write_text(error + "\n")


if __name__ == "__main__":
    for golden, made in ((GOLDEN, cases()), (EXPERTS, expert_cases())):
        for name, (error, files) in made.items():
            write(golden, name, error, files)
