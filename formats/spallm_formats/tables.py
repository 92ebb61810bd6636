"""A tables-only checkpoint: what it says about itself, and what ties it to its base."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .errors import FormatError
from .metadata import SketchedModule

TABLES_FILE = "sketch_tables.safetensors"
TABLES_METADATA_FILE = "sketch_tables.json"
TABLES_FORMAT = "spallm-tables"
TABLES_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TablesMetadata:
    """`sketch_tables.json`, parsed and checked.

    base_model and base_revision say where the index maps can be had, as far as it is known;
    fingerprint says which they are.
    """

    base_model: str | None
    base_revision: str | None
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        return {"format": TABLES_FORMAT, "format_version": TABLES_VERSION} | asdict(self)

    @classmethod
    def from_json(cls, document: Any) -> TablesMetadata:
        """Raises FormatError listing every problem."""
        if not isinstance(document, dict) or document.get("format") != TABLES_FORMAT:
            found = document.get("format") if isinstance(document, dict) else document
            raise FormatError(
                f"{TABLES_METADATA_FILE}: format is {found!r}, expected {TABLES_FORMAT!r}"
            )
        if document.get("format_version") != TABLES_VERSION:
            raise FormatError(
                f"{TABLES_METADATA_FILE}: format_version is {document.get('format_version')!r}, "
                f"this version of spallm-convert reads {TABLES_VERSION}: a newer one may read it"
            )
        values = {key: document[key] for key in document.keys() - {"format", "format_version"}}
        problems = [
            f"{TABLES_METADATA_FILE}: unknown key {key!r}"
            for key in values
            if key not in cls.__dataclass_fields__
        ]
        for key in ("base_model", "base_revision"):
            if not isinstance(values.get(key, ""), str | None):
                problems.append(f"{TABLES_METADATA_FILE}: {key} is {values[key]!r}, expected text")
        fingerprint = values.get("fingerprint")
        if not isinstance(fingerprint, str) or not _is_digest(fingerprint):
            problems.append(
                f"{TABLES_METADATA_FILE}: fingerprint is {fingerprint!r}, "
                "expected 64 hexadecimal digits"
            )
        if problems:
            raise FormatError(problems)
        return cls(
            base_model=values.get("base_model"),
            base_revision=values.get("base_revision"),
            fingerprint=values["fingerprint"],
        )


def fingerprint(modules: Mapping[str, SketchedModule], digests: Mapping[str, str]) -> str:
    """SHA-256, 64 hexadecimal digits, of the index maps of a model.

    digests: of each module, `map_digest` of its index map. Tables of equal fingerprint fit.
    """
    whole = hashlib.sha256()
    for name in sorted(modules):
        shape = modules[name]
        line = [
            name,
            shape.out_features,
            shape.in_features,
            shape.bits,
            shape.groups_per_row,
            digests[name],
        ]
        whole.update((" ".join(map(str, line)) + "\n").encode())
    return whole.hexdigest()


def map_digest(index_map: Any, hash_seed: int | None) -> str:
    """What a fingerprint takes of one index map: of its packed bytes, or the seed of its hash."""
    if hash_seed is not None:
        return f"hash:{hash_seed}"
    return hashlib.sha256(memoryview(index_map).cast("B")).hexdigest()


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
