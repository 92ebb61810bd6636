"""Spoil JSON documents and bytes, in ways that any family of files can use."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NUMBERS: list[Any] = [
    *(0, -1, 1, 2, 3, 5, 8, 9, 16, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32),
    *(1 << 53, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 10**30, 10**400),
    *(0.5, 1.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf")),
]
STRINGS: list[str] = [
    *("", " ", ".", "..", "/", "~", "-", "*", "null", "config.json", "float32", "bfloat16", "F32"),
    *("../outside.txt", "/etc/passwd", "a/../../b", "C:\\x", "a\\..\\b", "model.safetensors"),
    *("a\x1b[31mred", "two\nlines", "a\rb", "nul\x00", "\x9b2J", "\x7f", "\u202eabc", "\u2028"),
    *(
        "\ud800",
        "é" * 40,
        "\U0001d518",
        "x" * 300,
        "y" * 20_000,
        "model.layers.0.mlp.up_proj.weight",
    ),
]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], [1, 2], [None], {"a": 1}, [{}], ["a", 1]]


def odd_value(rng: random.Random) -> Any:
    """Return a value that few places accept."""
    return rng.choice(rng.choice((NUMBERS, STRINGS, OTHERS)))


def read(path: Path) -> Any:
    """Return the JSON document of a sound file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, document: Any) -> None:
    """Write a JSON document. Lone surrogates, NaN and numbers of any size are written too."""
    path.write_text(json.dumps(document), encoding="utf-8")


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place of a document, as a container and a key or index."""
    keys = document.keys() if isinstance(document, dict) else range(len(document))
    for key in list(keys):
        yield document, key
        if isinstance(document[key], dict | list):
            yield from places(document[key])


def odd_values(document: Any, rng: random.Random) -> Any:
    """Put odd values into one to three places of a document."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = list(places(document))
        if found:
            container, key = rng.choice(found)
            container[key] = odd_value(rng)
    return document


def near_values(document: Any, rng: random.Random) -> Any:
    """Change a number of a document by little, or a text by one letter."""
    found = [(c, k) for c, k in places(document) if isinstance(c[k], int | float | str)]
    if found:
        container, key = rng.choice(found)
        value = container[key]
        if isinstance(value, str):
            container[key] = value + "x" if rng.random() < 0.5 else value[:-1]
        elif isinstance(value, bool):
            container[key] = not value
        else:
            container[key] = rng.choice((value + 1, value - 1, value * 2, -value, value // 2))
    return document


def dropped(document: Any, rng: random.Random) -> Any:
    """Drop an entry."""
    found = list(places(document))
    if found:
        container, key = rng.choice(found)
        del container[key]
    return document


def renamed(document: Any, rng: random.Random) -> Any:
    """Rename a key."""
    found = [(c, k) for c, k in places(document) if isinstance(c, dict)]
    if found:
        container, key = rng.choice(found)
        container[rng.choice((key.upper(), key + " ", key[:-1], rng.choice(STRINGS)))] = (
            container.pop(key)
        )
    return document


def extra(document: Any, rng: random.Random) -> Any:
    """Add an entry that nobody knows."""
    found = [document, *(c[k] for c, k in places(document))]
    container = rng.choice([item for item in found if isinstance(item, dict)] or [{}])
    container[rng.choice([*STRINGS, "act_order", "scale", "version"])] = odd_value(rng)
    return document


def swapped(document: Any, rng: random.Random) -> Any:
    """Exchange the values of two places of one container."""
    found = [c for c, _ in places(document) if len(c) > 1]
    if found:
        container = rng.choice(found)
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        one, other = rng.sample(keys, 2)
        container[one], container[other] = container[other], container[one]
    return document


def other_document(document: Any, rng: random.Random) -> Any:
    """Return an odd value in place of the document."""
    return odd_value(rng)


DOCUMENTS: dict[str, Callable[[Any, random.Random], Any]] = {
    "odd values": odd_values,
    "near values": near_values,
    "dropped": dropped,
    "renamed": renamed,
    "extra": extra,
    "swapped": swapped,
    "another document": other_document,
}


def repeated_key(text: bytes, rng: random.Random) -> bytes:
    """Repeat the first key of a document with another value."""
    body = text.strip()[1:]
    key = body[body.find(b'"') + 1 :]
    key = key[: key.find(b'"')]
    return b'{"' + key + b'": ' + json.dumps(rng.choice(STRINGS)).encode() + b", " + body


def deep(text: bytes, rng: random.Random) -> bytes:
    """Nest thousands of lists or objects."""
    depth = rng.choice((900, 3_000, 100_000))
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    nested = opening * depth + b"1" + closing * depth
    return nested if rng.random() < 0.5 else b'{"a": ' + nested + b", " + text.strip()[1:]


def fat(text: bytes, rng: random.Random) -> bytes:
    """Write JSON whose objects need far more memory than its text."""
    wide = b"[" + rng.choice((b"[],", b"{},")) * rng.choice((20_000, 5_000_000)) + b"0]"
    return wide if rng.random() < 0.3 else b'{"a": ' + wide + b", " + text.strip()[1:]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Flip some bits."""
    spoiled = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 40)) if data else 0):
        spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
    return bytes(spoiled)


def truncated(data: bytes, rng: random.Random) -> bytes:
    """Cut the end off."""
    return data[: rng.choice((0, 1, 7, 8, 9, len(data) // 2, max(0, len(data) - 1)))]


def grown(data: bytes, rng: random.Random) -> bytes:
    """Append bytes."""
    return data + rng.choice((b"\0", b" ", b"\n{}", b"\xff" * 16, data))


def other_encoding(data: bytes, rng: random.Random) -> bytes:
    """Encode text in another way."""
    text = data.decode("utf-8", errors="replace")
    return rng.choice((text.encode("utf-16"), b"\xef\xbb\xbf" + data, b"\xff" + data, b"\0" + data))


TEXTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "repeated key": repeated_key,
    "deep": deep,
    "fat": fat,
    "flipped": flipped,
    "truncated": truncated,
    "grown": grown,
    "other encoding": other_encoding,
    "git-lfs pointer": lambda data, rng: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
    ),
}


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Any, body: bytes) -> bytes:
    """Return a safetensors file. header: a document, or its text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body
