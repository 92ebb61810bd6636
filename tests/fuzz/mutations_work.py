"""Spoil work folders of interrupted conversions: plan, marker, records, files, blocks.

`folder` is the work folder itself, `<output>/.spallm-partial`.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spallm_formats import sha256

from .cases import add_kind, kind
from .mutations_files import KINDS_OF_FILES, outside
from .registering import documents_of
from .spoiling import DOCUMENTS, STRINGS, TEXTS, join, odd_value, read, split, write

PLAN, MARKER = "plan.json", "complete.json"


def marker(folder: Path, rng: random.Random) -> dict[str, Any]:
    """Return the marker of files that are moved up, made up if the run did not get there."""
    path = folder / MARKER
    return read(path) if path.is_file() else {"names": ["config.json"], "obsolete": {}}


def _marker_kinds() -> None:
    def spoiler(change: Any) -> Callable[[Path, random.Random], None]:
        return lambda folder, rng: write(folder / MARKER, change(marker(folder, rng), rng))

    def text_spoiler(change: Any) -> Callable[[Path, random.Random], None]:
        def spoil(folder: Path, rng: random.Random) -> None:
            write(folder / MARKER, marker(folder, rng))
            (folder / MARKER).write_bytes(change((folder / MARKER).read_bytes(), rng))

        return spoil

    for name, change in DOCUMENTS.items():
        add_kind("work", f"{MARKER}: {name}", spoiler(change))
    for name, text in TEXTS.items():
        add_kind("work", f"{MARKER}: {name}", text_spoiler(text))
        add_kind("work", f"{PLAN}: {name}", _plan_text(text))
    for name, change in DOCUMENTS.items():
        add_kind("work", f"record: {name}", _record(change))


def _plan_text(change: Any) -> Callable[[Path, random.Random], None]:
    return lambda folder, rng: _rewrite(folder / PLAN, change, rng)


def _rewrite(path: Path, change: Any, rng: random.Random) -> None:
    path.write_bytes(change(path.read_bytes(), rng))


def _record(change: Any) -> Callable[[Path, random.Random], None]:
    def spoil(folder: Path, rng: random.Random) -> None:
        records = sorted(folder.glob("*.record.json"))
        path = rng.choice(records) if records else folder / PLAN
        write(path, change(read(path), rng))

    return spoil


@kind("work", "marker: names that lead out")
def names_that_lead_out(folder: Path, rng: random.Random) -> None:
    """List files of the user's to be removed or replaced."""
    document = marker(folder, rng)
    theirs = f"../{outside(folder).name}/thesis.txt"
    name = rng.choice((theirs, str(outside(folder) / "thesis.txt"), "../../x", *STRINGS))
    if rng.random() < 0.5:
        document["names"].append(name)
    else:  # with the hash that lets it be removed
        digest = sha256(outside(folder) / "thesis.txt")
        document["obsolete"][name] = digest
    write(folder / MARKER, document)


@kind("work", "marker: lost files")
def lost_files(folder: Path, rng: random.Random) -> None:
    """List files that are nowhere."""
    document = marker(folder, rng)
    document["names"] += [f"lost-{i}.json" for i in range(rng.choice((1, 5000)))]
    write(folder / MARKER, document)


@kind("work", "links: of folders")
def folder_links(folder: Path, rng: random.Random) -> None:
    """Put a link to the user's folder in the place of a folder of work."""
    names = [path.name for path in folder.iterdir() if path.is_dir()] or ["files"]
    path = folder / rng.choice([*names, "scratch", "files"])
    if path.is_dir():
        shutil.rmtree(path)
    path.symlink_to(outside(folder))


@kind("work", "links: the work folder")
def work_link(folder: Path, rng: random.Random) -> None:
    """Put a link to the user's folder in the place of the work folder, sometimes with a plan."""
    shutil.copytree(folder, outside(folder), dirs_exist_ok=True, symlinks=True)
    shutil.rmtree(folder)
    folder.symlink_to(outside(folder))


@kind("work", "links: of temporary files")
def temporary_links(folder: Path, rng: random.Random) -> None:
    """Leave a link to a file of the user's where the next run writes a temporary file."""
    names = ("plan.json.tmp", "complete.json.tmp", "model-00002-of-00009.safetensors.tmp")
    for name in {rng.choice(names), *(f"{p.name}.tmp" for p in (folder / "files").glob("*"))}:
        (folder / name).symlink_to(outside(folder) / "thesis.txt")
    if (folder / "files").is_dir():
        for name in ("config.json.tmp", "README.md.tmp", "conversion.json.tmp"):
            (folder / "files" / name).symlink_to(outside(folder) / "thesis.txt")


@kind("work", "lock")
def lock(folder: Path, rng: random.Random) -> None:
    """Put something else in the place of the lock."""
    (folder / "lock").touch()
    names = ("a folder", "a pipe", "a link outside", "a device", "a dangling link")
    KINDS_OF_FILES[rng.choice(names)](folder / "lock", rng)


@kind("work", "shard: of another plan")
def another_shard(folder: Path, rng: random.Random) -> None:
    """Change a finished shard and make its record fit."""
    shards = sorted((folder / "files").glob("*.safetensors"))
    if not shards:
        (folder / "files").mkdir(exist_ok=True)
        (folder / "files" / "model.safetensors").write_bytes(join({}, b""))
        return
    path = rng.choice(shards)
    _, body = split(path.read_bytes())
    spoiled = bytearray(body)
    spoiled[rng.randrange(len(spoiled))] ^= 1
    path.write_bytes(path.read_bytes()[: -len(body)] + bytes(spoiled))
    record = folder / f"{path.name}.record.json"
    if record.is_file() and rng.random() < 0.5:
        write(record, read(record) | {"sha256": sha256(path), "modules": odd_value(rng)})


@kind("work", "blocks: spoiled")
def blocks(folder: Path, rng: random.Random) -> None:
    """Change a calibrated block, and give it the name that its digest asks for."""
    found = sorted(folder.rglob("block-*.safetensors"))
    if not found:
        lost_files(folder, rng)
        return
    path = rng.choice(found)
    header, body = split(path.read_bytes())
    change = rng.choice(list(DOCUMENTS.values()))
    if rng.random() < 0.3:
        header["__metadata__"]["sums"] = rng.choice(("", "[" * 5000, "{}", "[]", "1", '{"a": 1}'))
    else:
        header = change(header, rng)
    try:
        path.write_bytes(join(header, body))
    except UnicodeEncodeError:
        return
    path.rename(path.with_name(f"{path.stem.rpartition('-')[0]}-{sha256(path)}.safetensors"))


@kind("work", "extra files")
def extras(folder: Path, rng: random.Random) -> None:
    """Leave things in the work folder that no run wrote."""
    (folder / "files").mkdir(exist_ok=True)
    for where in (folder, folder / "files"):
        path = where / rng.choice(("x", "config.json", "x.tmp", "deep"))
        if path.exists() or path.is_symlink():
            continue
        if rng.random() < 0.5:
            path.mkdir()
            (path / "y").write_text("y")
        else:
            path.write_text("[]")
    if rng.random() < 0.3:
        os.mkfifo(folder / "pipe.tmp")


documents_of("work", PLAN)
_marker_kinds()
