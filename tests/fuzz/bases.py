"""Make the sound folders that cases spoil a copy of: one or more of each family."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from helpers.tiny_gguf import save_tiny_gguf
from helpers.tiny_models import save_tiny_llama
from helpers.training import word_tokenizer
from spallm_convert import (
    CalibrationConfig,
    SketchConfig,
    convert,
    load_sketched,
    save_tables,
    set_trainable,
)
from spallm_formats import Staging, publishing

from .faults import FAMILY

#: A name that sources keep in every copy: the report holds it.
MODEL = "model"
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_SHARD = "12KB"


@dataclass
class Bases:
    """Hold the sound folders.

    Attributes:
        root: Folder that holds all of them.
        folders: The folders of each family.
        model: The model that tables are loaded onto.
        tokens: Its input in tests.
        plans: Options of the interrupted conversions, by name of the folder.
    """

    root: Path
    folders: dict[str, list[Path]] = field(default_factory=dict)
    model: Any = None
    tokens: torch.Tensor = field(default_factory=lambda: torch.arange(4)[None])
    plans: dict[str, SketchConfig] = field(default_factory=dict)

    @property
    def source(self) -> Path:
        """Return the dense model that everything is made from."""
        return self.root / "sharded" / MODEL

    def reference(self, name: str) -> Path:
        """Return the complete conversion that an interrupted one should end in."""
        return self.root / "references" / name


def shorten_text() -> None:
    """Leave a tenth of the built-in text: tokenizing all of it takes a third of a second."""
    from pydoc_data.topics import topics

    for name in sorted(topics)[10:]:
        del topics[name]


def make_bases(root: Path, families: Collection[str]) -> Bases:
    """Make the bases of some families, which also warms up all that they need."""
    bases = Bases(root)
    for name, size in (("sharded", _SHARD), ("single", "5GB")):
        folder = root / name / MODEL
        save_tiny_llama(folder, max_shard_size=size, **_SIZES)
        word_tokenizer().save_pretrained(folder)
        (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    bases.folders[FAMILY] = [bases.source / "config.json"]
    bases.folders["source"] = [root / name / MODEL for name in ("single", "sharded")]
    if set(families) - {FAMILY}:
        _make_sketches(bases)
    for family, make in _MAKERS.items():
        if family in families:
            make(bases)
    return bases


def _make_sketches(bases: Bases) -> None:
    configs = {
        "plain": SketchConfig(effort="fast", bits=3),
        "sharded": SketchConfig(effort="fast", bits=4, max_shard_size=_SHARD),
        "hash": SketchConfig(effort="fast", bits=3, mapping="hash"),
        "wide": SketchConfig(effort="fast", bits=2, groups_per_row=4, table_dtype="float32"),
    }
    folders = []
    for name, config in configs.items():
        folders.append(bases.root / "sketched" / name)
        convert(bases.source, folders[-1], config)
        with torch.no_grad():
            load_sketched(folders[-1])(bases.tokens)
    bases.folders["checkpoint"] = folders


def _make_tables(bases: Bases) -> None:
    bases.model = load_sketched(bases.folders["checkpoint"][0])
    set_trainable(bases.model, affine=True, dtype=None)  # so that no case adds parameters
    tuned = load_sketched(bases.folders["checkpoint"][0])
    generator = torch.Generator().manual_seed(1)
    folders = []
    for name in ("tables", "tables-and-norm"):
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.1 * noise.to(parameter.dtype)
        folders.append(save_tables(tuned, bases.root / "tables" / name))
        tuned.model.norm.weight.requires_grad_(True)
    affine = load_sketched(bases.folders["checkpoint"][0])
    set_trainable(affine, affine=True)
    for parameter in affine.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    folders.append(save_tables(affine, bases.root / "tables" / "affine"))
    bases.folders["tables"] = folders


class _Stop:
    """Interrupt a conversion after some modules."""

    def __init__(self, modules: int) -> None:
        self.left = modules

    def start(self, weights: int) -> None:
        pass

    def advance(self, weights: int, tensor: str) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def say(self, line: str) -> None:
        pass

    remark = say


def _make_work(bases: Bases) -> None:
    text = bases.root / "text.txt"
    text.write_text(" ".join(f"word{i * i % 126}" for i in range(400)))
    calibration = CalibrationConfig(text=str(text), samples=4, seqlen=16)
    bases.plans = {
        "shards": SketchConfig(effort="fast", max_shard_size=_SHARD),
        "published": SketchConfig(effort="fast", max_shard_size=_SHARD),
        "calibrated": SketchConfig(bits=2, max_shard_size=_SHARD, calibration=calibration),
    }
    stops = {"shards": 5, "published": 10**6, "calibrated": 10**6}
    folders = []
    for name, config in bases.plans.items():
        folders.append(bases.root / "work" / name / "out")
        convert(bases.source, bases.reference(name), config, device="cpu")
        _interrupted(bases.source, folders[-1], config, _Stop(stops[name]), name)
    bases.folders["work"] = folders


def _interrupted(source: Path, out: Path, config: SketchConfig, stop: _Stop, name: str) -> None:
    """Interrupt a conversion; if `stop` does not, do it when blocks or files are complete."""
    owner: Any = publishing if name == "published" else Staging
    patched = "finish_publishing" if name == "published" else "write_shard"
    original = getattr(owner, patched)
    if name != "shards":
        setattr(owner, patched, _interrupt)
    try:
        convert(source, out, config, device="cpu", progress=stop)
    except KeyboardInterrupt:
        return
    finally:
        setattr(owner, patched, original)
    raise AssertionError(f"{name}: the conversion was not interrupted")


def _interrupt(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def _make_gguf(bases: Bases) -> None:
    folder = bases.root / "gguf"
    folder.mkdir()
    path = save_tiny_gguf(folder / "model.gguf")
    convert(path, folder / "out")  # imports what reading GGUF needs
    shutil.rmtree(folder / "out")
    bases.folders["gguf"] = [path]


_MAKERS: dict[str, Callable[[Bases], None]] = {
    "tables": _make_tables,
    "work": _make_work,
    "gguf": _make_gguf,
}
