"""Make the parts of a calibrated conversion: model, tokenizer, text, options, and a way to stop."""

import random
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.tiny_models import save_tiny_llama
from helpers.training import word_tokenizer
from spallm_convert import CalibrationConfig, SketchConfig, load_sketched


def save_source(folder: Path) -> Path:
    """Save a Llama of two blocks, smaller than the default of `save_tiny_llama`."""
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    save_tiny_llama(folder, num_attention_heads=2, num_key_value_heads=1, **sizes)
    word_tokenizer().save_pretrained(folder)
    return folder


def save_uneven_source(folder: Path) -> Path:
    """Save a larger Llama, whose second block matters more than its first."""
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    save_tiny_llama(folder, initializer_range=0.1, **sizes)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    for name in tensors:
        if "layers.0" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] *= 0.05
    save_file(tensors, weights, metadata={"format": "pt"})
    word_tokenizer().save_pretrained(folder)
    return folder


def save_text(path: Path, words: int = 4000) -> Path:
    """Save random words that the tokenizer knows."""
    generator = random.Random(0)
    path.write_text(" ".join(f"word{generator.randrange(126)}" for _ in range(words)))
    return path


def options(text: Path, **changes: object) -> SketchConfig:
    """Return options: two bits, two groups, float32 tables, unless they are changed."""
    given = {"bits": 2, "groups_per_row": 2, "samples": 16, "seqlen": 32}
    return calibrated(text, **given | {"table_dtype": "float32"} | changes)


def calibrated(text: Path | str, **given: object) -> SketchConfig:
    """Return a config for a text. given: options of both configs, told apart by their names."""
    names = {field.name for field in fields(CalibrationConfig)}
    nested = {name: given.pop(name) for name in names & given.keys()}
    return SketchConfig(calibration=CalibrationConfig(text=str(text), **nested), **given)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint."""
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def divergence(source: Path, folder: Path, text: Path) -> float:
    """Return KL(dense || sketched) on text like the calibration text, in nats per token."""
    words = text.read_text().split()[-1024:]
    tokens = torch.tensor([2 + int(word.removeprefix("word")) for word in words]).reshape(32, 32)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    sketched = load_sketched(folder, dtype=torch.float32)
    with torch.no_grad():
        expected, found = (model(tokens).logits.log_softmax(-1) for model in (dense, sketched))
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


class StopAt:
    """Stop a conversion after N modules or N lines, and list both.

    A block of `save_source` has seven modules. weights: weights that are left.
    """

    def __init__(self, modules: int = 10**6, *, lines: int = 10**6) -> None:
        self.modules, self.lines = modules, lines
        self.weights = 0
        self.done: list[str] = []
        self.said: list[str] = []

    def start(self, weights: int) -> None:
        self.weights = weights

    def say(self, line: str) -> None:
        self.said.append(line)
        if len(self.said) == self.lines:
            raise KeyboardInterrupt

    remark = say

    def advance(self, weights: int, tensor: str) -> None:
        self.weights -= weights
        self.done.append(tensor)
        if len(self.done) == self.modules:
            raise KeyboardInterrupt
