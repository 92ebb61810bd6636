"""What a calibrated conversion needs: a small model with a tokenizer, a text, and a way to stop."""

import random
from pathlib import Path

from helpers.tiny_models import save_tiny_llama
from helpers.training import word_tokenizer


def save_source(folder: Path) -> Path:
    """A Llama of two blocks, smaller than `save_tiny_llama` makes it by itself."""
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    save_tiny_llama(folder, num_attention_heads=2, num_key_value_heads=1, **sizes)
    word_tokenizer().save_pretrained(folder)
    return folder


def save_text(path: Path) -> Path:
    """4,000 words at random, of those that the tokenizer has."""
    generator = random.Random(0)
    path.write_text(" ".join(f"word{generator.randrange(126)}" for _ in range(4000)))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint."""
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class StopAt:
    """Stops a conversion when so many modules are done; a block of `save_source` has seven."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.done: list[str] = []

    def start(self, weights: int) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def advance(self, weights: int, tensor: str) -> None:
        self.done.append(tensor)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
