"""Spoil GGUF files: the fixed header, counts, strings, types, and the data.

`u32 magic | u32 version | u64 tensors | u64 pairs | pairs | tensor infos | data`
"""

from __future__ import annotations

import random
import struct
from pathlib import Path

from .cases import kind

COUNTS = (0, 1, 2, 1 << 16, 1 << 31, 1 << 40, 1 << 62, (1 << 64) - 1)


def _patched(path: Path, at: int, data: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + data + whole[at + len(data) :])


@kind("gguf", "magic")
def magic(path: Path, rng: random.Random) -> None:
    """Change the first four bytes."""
    _patched(path, 0, rng.choice((b"GGML", b"FUGG", b"\0\0\0\0", b"PK\3\4")))


@kind("gguf", "version")
def version(path: Path, rng: random.Random) -> None:
    """Change the version, also to that of the other byte order."""
    _patched(path, 4, rng.choice((b"\0\0\0\3", b"\0\0\0\0", b"\1\0\0\0", b"\xff" * 4)))


@kind("gguf", "count of tensors")
def tensors(path: Path, rng: random.Random) -> None:
    """Change the number of tensors."""
    _patched(path, 8, struct.pack("<Q", rng.choice(COUNTS)))


@kind("gguf", "count of pairs")
def pairs(path: Path, rng: random.Random) -> None:
    """Change the number of key-value pairs."""
    _patched(path, 16, struct.pack("<Q", rng.choice(COUNTS)))


@kind("gguf", "length of a string")
def string_length(path: Path, rng: random.Random) -> None:
    """Change the length of a key."""
    data = path.read_bytes()
    at = rng.choice([i for i in range(24, len(data) // 2) if data[i : i + 6] == b"llama."])
    _patched(path, at - 8, struct.pack("<Q", rng.choice(COUNTS)))


@kind("gguf", "text")
def text(path: Path, rng: random.Random) -> None:
    """Change the letters of keys and names."""
    data = path.read_bytes()
    old = rng.choice((b"llama", b"blk", b"attn", b"token_embd", b"general", b"tokenizer"))
    new = rng.choice((b"\x1b[2Jxxxxxxxxx", b"\xff" * 12, b"\n" * 12, b"gpt2gpt2gpt2"))[: len(old)]
    path.write_bytes(data.replace(old, new, rng.choice((1, -1))))


@kind("gguf", "any field")
def field(path: Path, rng: random.Random) -> None:
    """Put a number anywhere into the header."""
    data = path.read_bytes()
    number = rng.choice((0, 1, 255, 1 << 31, (1 << 32) - 1))
    _patched(path, rng.randrange(4, max(5, len(data) // 4)), struct.pack("<I", number))


@kind("gguf", "cut in the header")
def cut(path: Path, rng: random.Random) -> None:
    """Cut the file within its header."""
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data) // 4)])


@kind("gguf", "not finite")
def not_finite(path: Path, rng: random.Random) -> None:
    """Put NaN into the data."""
    size = path.stat().st_size
    _patched(path, rng.randrange(size // 2, size - 64) // 32 * 32, b"\xff" * 16)
