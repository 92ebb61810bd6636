"""Describe a tables-only checkpoint and identify the base that it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .errors import FormatError
from .files import load_json
from .module import SketchedModule
from .text import shown

TABLES_FILE = "sketch_tables.safetensors"
TABLES_METADATA_FILE = "sketch_tables.json"
TABLES_FORMAT = "spallm-tables"
#: Versions of checkpoints with full tables, and with affine numbers.
TABLES_VERSION = 1
AFFINE_VERSION = 2
AFFINE = "affine"
#: Dtypes of the tensors in a tables-only checkpoint, as safetensors names them.
TABLES_DTYPES = ("BF16", "F16", "F32", "F64")
#: The key of the description among the metadata of the tables file.
_DESCRIPTION = "sketch_tables"


@dataclass(frozen=True, kw_only=True)
class TablesMetadata:
    """Hold the parsed and checked description of a tables-only checkpoint.

    Attributes:
        base_model: Where the base, with its index maps, comes from; None if unknown.
        base_revision: Revision of the base; None if unknown.
        fingerprint: Fingerprint of the base's index maps, from `fingerprint`.
        base_tables: Digest of the base's tables, from `tables_digest`, if the checkpoint is affine:
            it holds a shift and a scale for each table of the base. None: it holds full tables.
    """

    base_model: str | None
    base_revision: str | None
    fingerprint: str
    base_tables: str | None = None

    @property
    def is_affine(self) -> bool:
        """Return whether the checkpoint holds affine numbers and not full tables."""
        return self.base_tables is not None

    def to_json(self) -> dict[str, Any]:
        """Return the contents of `sketch_tables.json`."""
        values = asdict(self)
        if self.is_affine:
            version: dict[str, Any] = {"format_version": AFFINE_VERSION, "kind": AFFINE}
        else:
            version = {"format_version": TABLES_VERSION}
            del values["base_tables"]
        return {"format": TABLES_FORMAT} | version | values

    def to_header(self) -> dict[str, str]:
        """Return the description as metadata of the tables file."""
        return {_DESCRIPTION: json.dumps(self.to_json(), separators=(",", ":"))}

    @classmethod
    def from_header(cls, metadata: dict[str, str]) -> TablesMetadata | None:
        """Parse the description in the metadata of a tables file.

        Args:
            metadata: The metadata, from `header_metadata`.

        Returns:
            The description. None: the file has none, as in older checkpoints.

        Raises:
            FormatError: If there are problems; it lists all of them.
        """
        text = metadata.get(_DESCRIPTION)
        if text is None:
            return None
        where = f"{TABLES_FILE}: {_DESCRIPTION} in its metadata"
        return cls.from_json(load_json(text.encode("utf-8"), where), where)

    @classmethod
    def from_json(cls, document: Any, where: str = TABLES_METADATA_FILE) -> TablesMetadata:
        """Parse the contents of `sketch_tables.json`.

        Args:
            document: The parsed JSON.
            where: Where the document comes from, for messages.

        Returns:
            The description.

        Raises:
            FormatError: If there are problems; it lists all of them.
        """
        if not isinstance(document, dict) or document.get("format") != TABLES_FORMAT:
            found = document.get("format") if isinstance(document, dict) else document
            raise FormatError(f"{where}: format is {shown(found)}, expected {TABLES_FORMAT!r}")
        version = document.get("format_version")
        if type(version) is not int or version not in (TABLES_VERSION, AFFINE_VERSION):
            raise FormatError(
                f"{where}: format_version is {shown(version)}, this version of spallm-convert "
                f"reads {TABLES_VERSION} and {AFFINE_VERSION}: try a newer version"
            )
        is_affine = version == AFFINE_VERSION
        values = {key: document[key] for key in document.keys() - {"format", "format_version"}}
        known = {"base_model", "base_revision", "fingerprint"}
        if is_affine:
            known |= {"kind", "base_tables"}
        problems = [f"{where}: unknown key {shown(key)}" for key in sorted(values.keys() - known)]
        if is_affine and values.get("kind") != AFFINE:
            problems.append(
                f"{where}: kind is {shown(values.get('kind'))}, expected {AFFINE!r} with "
                f"format_version {AFFINE_VERSION}"
            )
        for key in ("base_model", "base_revision"):
            if not isinstance(values.get(key, ""), str | None):
                problems.append(f"{where}: {key} is {shown(values[key])}, expected text or null")
        for key in ("fingerprint", "base_tables") if is_affine else ("fingerprint",):
            digest = values.get(key)
            if not isinstance(digest, str) or not _is_digest(digest):
                problems.append(
                    f"{where}: {key} is {shown(digest)}, expected 64 hexadecimal digits"
                )
        if problems:
            raise FormatError(problems)
        return cls(
            base_model=values.get("base_model"),
            base_revision=values.get("base_revision"),
            fingerprint=values["fingerprint"],
            base_tables=values.get("base_tables"),
        )


def fingerprint(modules: Mapping[str, SketchedModule], digests: Mapping[str, str]) -> str:
    """Compute the fingerprint of a model's index maps.

    Tables with an equal fingerprint fit the model.

    Args:
        modules: Sketched modules by name.
        digests: `map_digest` of each module's index map, by name.

    Returns:
        SHA-256, 64 hexadecimal digits (see SPEC.md for the text that is hashed).
    """
    whole = hashlib.sha256()
    for name in sorted(modules):
        shape = modules[name]
        line = [
            name,
            shape.rows,
            shape.in_features,
            shape.bits,
            shape.groups_per_row,
            digests[name],
        ]
        whole.update((" ".join(map(str, line)) + "\n").encode())
    return whole.hexdigest()


def map_digest(index_map: Any, hash_seed: int | None) -> str:
    """Compute the digest of one index map, which `fingerprint` takes.

    Args:
        index_map: Packed index map, a C-contiguous buffer; ignored with `hash_seed`.
        hash_seed: Seed of the `hash` mapping; None if codes are stored.

    Returns:
        SHA-256 of the packed bytes, 64 hexadecimal digits; or `hash:` and the seed.
    """
    if hash_seed is not None:
        return f"hash:{hash_seed}"
    return hashlib.sha256(memoryview(index_map).cast("B")).hexdigest()


def tables_digest(tables: Iterable[tuple[str, Any]]) -> str:
    """Compute the digest of a base's tables, which affine numbers are for.

    Args:
        tables: Name of each sketched module, ascending, and its tables rounded to bfloat16: a
            C-contiguous buffer of little-endian numbers.

    Returns:
        SHA-256, 64 hexadecimal digits (see SPEC.md for the text that is hashed).
    """
    whole = hashlib.sha256()
    for name, values in tables:
        digest = hashlib.sha256(memoryview(values).cast("B")).hexdigest()
        whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
