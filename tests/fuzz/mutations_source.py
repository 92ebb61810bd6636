"""Spoil dense models: config, headers, index, tokenizer and card, and names of all sorts."""

from __future__ import annotations

import os
import random
from pathlib import Path

from .cases import KINDS, add_kind, kind
from .mutations_files import outside
from .registering import documents_of, headers_of, texts_of
from .spoiling import STRINGS, join, read, split, write

for _name in (
    "header: length",
    "data: flipped",
    "data: not finite",
    "config: another model",
    "config: without quantization_config",
    "files: both kinds of weights",
    "files: extra ones",
):
    add_kind("source", _name, KINDS["checkpoint"][_name])


@kind("source", "names: of files")
def names_of_files(folder: Path, rng: random.Random) -> None:
    """Add files with odd names, which are copied into the checkpoint."""
    for _ in range(rng.choice((1, 3))):
        name = rng.choice(
            (
                *("a\nb.json", "\x1b[2J.txt", "LICENSE \u202e", "é.json", "a b.txt", "~.json"),
                *("-o.txt", "..json", "C:\\x.txt", "a\\b.json", "CONVERSION.JSON", "CON.txt"),
                *("config.json.txt", "model.safetensors.index.json.txt", "x" * 240 + ".json"),
            )
        )
        (folder / name).write_text("{}")
    if rng.random() < 0.3:
        (folder / os.fsdecode(b"\xff\xfe.json")).write_text("{}")


@kind("source", "names: of our own files")
def names_of_our_files(folder: Path, rng: random.Random) -> None:
    """Add what the converter writes itself: report, card, work folder."""
    name = rng.choice(("conversion.json", "README.md", ".spallm-partial", "complete.json"))
    if name.startswith("."):
        (folder / name).mkdir()
    else:
        (folder / name).write_text(rng.choice(("{}", "---\nlicense: mit\n---\n", "x")))


@kind("source", "card")
def card(folder: Path, rng: random.Random) -> None:
    """Write a model card whose metadata is odd."""
    text = rng.choice(STRINGS).encode("utf-8", "replace").decode()
    aliases = "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a, *a]\n" for i in range(9))
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 25)
    )
    front = rng.choice(
        (
            f"license: {text}",
            'license: "\\e[31mred"',
            "license: [mit, apache-2.0]",
            "license: !!python/object/apply:os.system ['touch owned']",
            "license: 2024-01-01\nlicense_name: 0x10",
            "license: |\n  one\n  two\n---\nowned",
            "license: {a: .nan}",
            aliases,
            bomb + "license: *a24",
            "- a list",
            "[" * 3000,
            "license: " + "y" * 100_000,
            "",
        )
    )
    (folder / "README.md").write_text(f"---\n{front}\n---\n{text}\n", encoding="utf-8")


@kind("source", "tokenizer")
def tokenizer(folder: Path, rng: random.Random) -> None:
    """Write a file of the tokenizer that is odd. It is copied and not read."""
    name = rng.choice(("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
    contents = (b"", b"[" * 10_000, b"\xff\xfe", b"{{ '\x1b' }}", b"{" + b'"a":1,' * 9 + b"}")
    (folder / name).write_bytes(rng.choice(contents))


@kind("source", "links: of extra files")
def links(folder: Path, rng: random.Random) -> None:
    """Link a folder or file of the user's into the model."""
    name = rng.choice(("additional_chat_templates", "vocab.txt", "merges.txt", "loop.json"))
    target = outside(folder) if name.startswith("add") else outside(folder) / "thesis.txt"
    (folder / name).symlink_to(name if name == "loop.json" else target)


@kind("source", "code")
def code(folder: Path, rng: random.Random) -> None:
    """Name code of the repository, which must not run."""
    config = read(folder / "config.json")
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.C"}
    config["architectures"] = rng.choice((["Model"], config["architectures"]))
    if rng.random() < 0.5:
        config["model_type"] = "model"
    write(folder / "config.json", config)
    owned = outside(folder) / "owned"
    (folder / "modeling.py").write_text(f"open({str(owned)!r}, 'w')\n")


@kind("source", "tensors: without a layer")
def missing_tensor(folder: Path, rng: random.Random) -> None:
    """Remove a tensor, or rename it to the table of a sketch."""
    path = sorted(folder.glob("*.safetensors"))[0]
    header, body = split(path.read_bytes())
    names = [n for n in header if n != "__metadata__"]
    last = max(names, key=lambda n: header[n]["data_offsets"][1])
    if rng.random() < 0.5:
        begin, _ = header.pop(last)["data_offsets"]
        path.write_bytes(join(header, body[:begin]))
    else:
        header[rng.choice(names) + "_table"] = header.pop(last)
        path.write_bytes(join(header, body))


@kind("source", "tensors: none")
def no_tensors(folder: Path, rng: random.Random) -> None:
    """Leave no tensor at all, or only empty ones."""
    for path in folder.glob("*.safetensors"):
        empty = {"model.norm.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
        path.write_bytes(join(rng.choice(({}, empty)), b""))


documents_of("source", "config.json")
documents_of("source", "model.safetensors.index.json")
texts_of("source", "config.json")
texts_of("source", "model.safetensors.index.json")
headers_of("source")
