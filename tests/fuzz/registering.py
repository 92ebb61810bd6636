"""Register the changes of documents, texts and headers for a file of a family."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cases import add_kind
from .spoiling import DOCUMENTS, STRINGS, TEXTS, join, read, split, write

Document = Callable[[Any, random.Random], Any]


def documents_of(family: str, filename: str, part: str | None = None) -> None:
    """Register every change of documents for a file, or for one part of its document."""

    def spoiler(change: Document) -> Callable[[Path, random.Random], None]:
        def spoil(folder: Path, rng: random.Random) -> None:
            path = folder / filename
            if not path.is_file():
                path = folder / "config.json"
            document = read(path)
            if part is None:
                document = change(document, rng)
            elif part in document:
                document[part] = change(document[part], rng)
            write(path, document)

        return spoil

    for name, change in DOCUMENTS.items():
        add_kind(family, f"{part or filename}: {name}", spoiler(change))


def texts_of(family: str, filename: str) -> None:
    """Register every change of texts for a file."""

    def spoiler(change: Callable[[bytes, random.Random], bytes]) -> Any:
        def spoil(folder: Path, rng: random.Random) -> None:
            path = folder / filename
            if not path.is_file():
                path = folder / "config.json"
            path.write_bytes(change(path.read_bytes(), rng))

        return spoil

    for name, change in TEXTS.items():
        add_kind(family, f"{filename}: {name}", spoiler(change))


def shard(folder: Path, rng: random.Random) -> Path:
    """Choose a file of weights."""
    return rng.choice(sorted(folder.glob("*.safetensors")))


def edit_header(folder: Path, rng: random.Random, change: Document) -> None:
    """Change the header of a file of weights; the data stays."""
    path = shard(folder, rng)
    header, body = split(path.read_bytes())
    path.write_bytes(join(change(header, rng), body))


def headers_of(family: str) -> None:
    """Register the changes of headers."""

    def spoiler(change: Document) -> Any:
        return lambda folder, rng: edit_header(folder, rng, change)

    def spoiled_text(change: Callable[[bytes, random.Random], bytes]) -> Any:
        def spoil(folder: Path, rng: random.Random) -> None:
            path = shard(folder, rng)
            header, body = split(path.read_bytes())
            path.write_bytes(join(change(json.dumps(header).encode(), rng), body))

        return spoil

    for name, change in DOCUMENTS.items():
        add_kind(family, f"header: {name}", spoiler(change))
    for name, text in TEXTS.items():
        add_kind(family, f"header: {name}", spoiled_text(text))
    for name, change in HEADERS.items():
        add_kind(family, f"header: {name}", spoiler(change))


def shifted(header: Any, rng: random.Random) -> Any:
    """Move the bytes of a tensor."""
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    by = rng.choice((1, -1, 8, -8, 1 << 40, 1 << 63))
    both = rng.random() < 0.7
    begin, end = entry["data_offsets"]
    entry["data_offsets"] = [begin + by, end + by] if both else [begin, end + by]
    return header


def reshaped(header: Any, rng: random.Random) -> Any:
    """Give a tensor another shape of as many elements."""
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    shape = entry["shape"]
    entry["shape"] = rng.choice((shape[::-1], [*shape, 1], [1, *shape], [*shape, 1] * 1))
    if rng.random() < 0.3:
        entry["shape"] = [*shape, *[1] * rng.choice((10, 100, 10_000, 300_000))]
    return header


def retyped(header: Any, rng: random.Random) -> Any:
    """Give a tensor another dtype of the same width, or any."""
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    same = {"BF16": ["F16", "I16", "U16"], "F32": ["I32", "U32"], "U8": ["I8", "BOOL", "F8_E4M3"]}
    entry["dtype"] = rng.choice([*same.get(entry["dtype"], []), "F64", "f32", "F4", "C64", ""])
    return header


def exchanged(header: Any, rng: random.Random) -> Any:
    """Exchange the names of two tensors, of the same shape if there are any."""
    names = [name for name in header if name != "__metadata__"]
    one = rng.choice(names)
    alike = [n for n in names if n != one and header[n]["shape"] == header[one]["shape"]]
    other = rng.choice(alike or names)
    header[one], header[other] = header[other], header[one]
    return header


def named(header: Any, rng: random.Random) -> Any:
    """Give a tensor a name that is odd, or that some other tensor could have."""
    names = [name for name in header if name != "__metadata__"]
    old = rng.choice(names)
    new = rng.choice((rng.choice(STRINGS), old + ".weight_table", "model." + old, old.upper()))
    return {(new if name == old else name): entry for name, entry in header.items()}


def empty_tensors(header: Any, rng: random.Random) -> Any:
    """Add tensors without elements, some of them with huge shapes."""
    shapes: list[list[int]] = [[0], [0, 1 << 40], [1 << 62, 0, 1 << 62], [0] * 70]
    end = max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
    for i in range(rng.choice((1, 50))):
        name = f"extra.{i}" + rng.choice(("", ".weight", ".weight_table"))
        entry = {"dtype": "F32", "shape": rng.choice(shapes), "data_offsets": [end, end]}
        header[name] = entry
    return header


def many_tensors(header: Any, rng: random.Random) -> Any:
    """Add so many tensors, all damaged, that slow reports are noticed."""
    for i in range(rng.choice((2_000, 20_000))):
        header[f"many.{i}"] = {"dtype": "F32", "shape": [1], "data_offsets": [i, i + 1]}
    return header


def other_metadata(header: Any, rng: random.Random) -> Any:
    """Change the metadata of the file."""
    header["__metadata__"] = rng.choice(
        ({}, {"format": "np"}, {"format": 1}, [], "pt", None, {"a": "b" * 1000}, {"\x1b": "\x1b"})
    )
    return header


HEADERS: dict[str, Document] = {
    "shifted": shifted,
    "reshaped": reshaped,
    "retyped": retyped,
    "exchanged": exchanged,
    "named": named,
    "empty tensors": empty_tensors,
    "many tensors": many_tensors,
    "metadata": other_metadata,
}
