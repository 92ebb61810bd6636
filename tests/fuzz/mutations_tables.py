"""Spoil tables-only checkpoints: the description, the header and the data."""

from __future__ import annotations

import random
from pathlib import Path

from spallm_formats import TABLES_FILE, TABLES_METADATA_FILE

from .cases import kind
from .registering import documents_of, headers_of, texts_of
from .spoiling import join, odd_value, read, split, write


@kind("tables", "fingerprint")
def fingerprint(folder: Path, rng: random.Random) -> None:
    """Change the fingerprint."""
    path = folder / TABLES_METADATA_FILE
    document = read(path)
    found = document["fingerprint"]
    other = ("f" if found[0] == "0" else "0") + found[1:]
    document["fingerprint"] = rng.choice((other, found.upper(), found + "\n", odd_value(rng)))
    write(path, document)


@kind("tables", "base")
def base(folder: Path, rng: random.Random) -> None:
    """Name another base; with a wrong fingerprint, the name is printed."""
    path = folder / TABLES_METADATA_FILE
    document = read(path)
    document[rng.choice(("base_model", "base_revision"))] = odd_value(rng)
    if rng.random() < 0.5:
        document["fingerprint"] = "0" * 64
    write(path, document)


@kind("tables", "affine")
def affine(folder: Path, rng: random.Random) -> None:
    """Describe full tables as affine numbers or the other way round, or spoil what affine needs."""
    path, described = folder / TABLES_FILE, folder / TABLES_METADATA_FILE
    header, body = split(path.read_bytes())
    header["__metadata__"] = {"format": "pt"}
    path.write_bytes(join(header, body))
    document = read(described)
    if "kind" not in document:
        document |= {"format_version": 2, "kind": "affine", "base_tables": "0" * 64}
    elif rng.random() < 0.3:
        del document["kind"], document["base_tables"]
        document["format_version"] = 1
    else:
        document[rng.choice(("kind", "base_tables", "format_version"))] = odd_value(rng)
    write(described, document)


@kind("tables", "data: flipped")
def data_flipped(folder: Path, rng: random.Random) -> None:
    """Flip bits of the data alone."""
    path = folder / TABLES_FILE
    data = path.read_bytes()
    body = bytearray(split(data)[1])
    for _ in range(rng.choice((1, 3, 30))):
        body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    path.write_bytes(data[: -len(body)] + bytes(body))


@kind("tables", "another parameter")
def another_parameter(folder: Path, rng: random.Random) -> None:
    """Add a tensor: a parameter of the base, an index map, or something else."""
    path = folder / TABLES_FILE
    header, body = split(path.read_bytes())
    endings = (".weight_table", ".weight_scale")
    table = rng.choice([name for name in header if name.endswith(endings)])
    name, shape, dtype = rng.choice(
        (
            ("model.norm.weight", [32], "F32"),
            ("model.norm.weight", [32], "BF16"),
            ("model.norm.weight", [31], "F32"),
            ("model.norm.weight", [32], "I32"),
            (table.rpartition("_")[0], [32, 16], "U8"),
            (table.rpartition("_")[0] + "_shift", [32, 1], "F32"),
            (table.rpartition("_")[0] + "_table", [32, 1, 8], "BF16"),
            (table.replace("model.", ""), header[table]["shape"], header[table]["dtype"]),
            ("lm_head.weight", [64, 32], "F8_E4M3"),
            ("\x1b[2Jx", [1], "F32"),
            ("", [0], "F64"),
        )
    )
    size = {"F32": 4, "BF16": 2, "I32": 4, "U8": 1, "F8_E4M3": 1, "F64": 8}[dtype]
    for length in shape:
        size *= length
    header[name] = {
        "dtype": dtype,
        "shape": shape,
        "data_offsets": [len(body), len(body) + size],
    }
    path.write_bytes(join(header, body + bytes(size)))


@kind("tables", "file names")
def file_names(folder: Path, rng: random.Random) -> None:
    """Rename a file."""
    name = rng.choice((TABLES_FILE, TABLES_METADATA_FILE))
    (folder / name).rename(folder / rng.choice(("model.safetensors", "config.json", name + ".tmp")))


documents_of("tables", TABLES_METADATA_FILE)
texts_of("tables", TABLES_METADATA_FILE)
headers_of("tables")
