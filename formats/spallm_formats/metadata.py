"""Parse and write `quantization_config`, which lists the sketched modules of a checkpoint.

The list is exact: a module is sketched if and only if it is listed, with every number that a reader
needs to decode it. Nothing is inferred from name patterns or skip lists. Unknown keys are refused,
because they could change the meaning of the known ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .dtypes import TABLE_DTYPES
from .errors import FormatError
from .header import SIZE_LIMIT, TensorSpec
from .module import TABLE_SUFFIX, SketchedModule
from .packing import MAX_BITS
from .text import shown

QUANT_METHOD = "spallm"
FORMAT_VERSION = 1
MAPPINGS = ("cluster", "hash")


@dataclass(frozen=True, kw_only=True)
class SketchMetadata:
    """Hold a parsed and checked `quantization_config`.

    Attributes:
        mapping: "cluster" (the index map is stored) or "hash" (it is computed from `hash_seed`).
        table_dtype: "bfloat16", "float16" or "float32".
        modules: Sketched modules by name.
        hash_seed: Seed of the `hash` mapping, 0 to 2^32 - 1.
    """

    mapping: str
    table_dtype: str
    modules: Mapping[str, SketchedModule]
    hash_seed: int = 0

    @property
    def bits(self) -> int:
        """Return the largest `bits` of any module; 0 if no module is sketched."""
        return max((module.bits for module in self.modules.values()), default=0)

    def tensors(self) -> dict[str, TensorSpec]:
        """Return every stored tensor of the sketched modules, by name."""
        return {
            spec.name: spec
            for name, module in self.modules.items()
            for spec in module.tensors(name, self.mapping, self.table_dtype)
        }

    def to_json(self) -> dict[str, Any]:
        """Return the `quantization_config` object of `config.json`."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "bits": self.bits,
            "mapping": self.mapping,
            "hash_seed": self.hash_seed,
            "table_dtype": self.table_dtype,
            "modules": {name: module.to_json() for name, module in self.modules.items()},
        }

    @classmethod
    def from_json(cls, document: Any) -> SketchMetadata:
        """Parse a `quantization_config`.

        Args:
            document: The parsed JSON.

        Returns:
            The metadata.

        Raises:
            FormatError: If there are problems; it lists all of them.
        """
        if not isinstance(document, dict):
            raise FormatError(f"quantization_config must be an object, found {shown(document)}")
        if document.get("quant_method") != QUANT_METHOD:
            raise FormatError(
                f"quant_method is {shown(document.get('quant_method'))}, expected {QUANT_METHOD!r}"
            )
        if document.get("format_version") != FORMAT_VERSION:
            raise FormatError(
                f"format_version is {shown(document.get('format_version'))}, this version of "
                f"spallm-convert reads {FORMAT_VERSION}: try a newer version"
            )
        problems = _key_problems("quantization_config", document, _TOP_LEVEL)
        modules = document.get("modules")
        if isinstance(modules, dict):
            for name, module in modules.items():
                problems += _module_problems(name, module)
            if not problems:
                widest = max((module["bits"] for module in modules.values()), default=0)
                if document["bits"] != widest:
                    problems.append(f"bits is {document['bits']}, the widest module has {widest}")
        if problems:
            raise FormatError(problems)
        metadata = cls(
            mapping=document["mapping"],
            table_dtype=document["table_dtype"],
            hash_seed=document["hash_seed"],
            modules={
                name: SketchedModule(**module) for name, module in document["modules"].items()
            },
        )
        if problems := _tensor_problems(metadata):
            raise FormatError(problems)
        return metadata


_Check = tuple[Callable[[Any], bool], str]


def _is_integer(low: int, high: int) -> _Check:
    return (lambda value: type(value) is int and low <= value <= high), f"{low} to {high}"


def _is_one_of(*accepted: str) -> _Check:
    return (lambda value: value in accepted), " or ".join(map(repr, accepted))


_TOP_LEVEL: dict[str, _Check] = {
    "quant_method": _is_one_of(QUANT_METHOD),
    "format_version": _is_integer(FORMAT_VERSION, FORMAT_VERSION),
    "bits": _is_integer(0, MAX_BITS),
    "mapping": _is_one_of(*MAPPINGS),
    "hash_seed": _is_integer(0, 2**32 - 1),
    "table_dtype": _is_one_of(*TABLE_DTYPES),
    "modules": ((lambda value: isinstance(value, dict)), "an object"),
}
_MODULE: dict[str, _Check] = {
    "in_features": _is_integer(1, 2**31 - 1),
    "out_features": _is_integer(1, 2**31 - 1),
    "bits": _is_integer(1, MAX_BITS),
    "groups_per_row": _is_integer(1, 2**31 - 1),
}
_OPTIONAL: dict[str, _Check] = {
    "experts": _is_integer(1, 2**31 - 1),
    "transposed": ((lambda value: value is True), "true, or no such key"),
}


def _key_problems(
    where: str,
    document: dict[str, Any],
    checks: dict[str, _Check],
    optional: Mapping[str, _Check] = MappingProxyType({}),
) -> list[str]:
    every = {**checks, **optional}
    problems = [f"{where}: unknown key {shown(key)}" for key in document if key not in every]
    for key, (accepts, accepted) in every.items():
        if key not in document:
            if key in checks:
                problems.append(f"{where}: {key} is missing")
        elif not accepts(document[key]):
            problems.append(f"{where}: {key} is {shown(document[key])}, expected {accepted}")
    return problems


def _module_problems(name: str, module: Any) -> list[str]:
    where = f"module {shown(name)}"
    if not name or not isinstance(module, dict):
        return [f"{where}: expected the name of a module and an object"]
    problems = _key_problems(where, module, _MODULE, _OPTIONAL)
    if not problems and module["in_features"] % module["groups_per_row"]:
        problems.append(
            f"{where}: groups_per_row {module['groups_per_row']} does not divide "
            f"in_features {module['in_features']}"
        )
    return problems


def _tensor_problems(metadata: SketchMetadata) -> list[str]:
    """Return the modules whose tensors would be too large or have names that are taken."""
    shapes = set(metadata.modules.values())  # few, even if there are 70,000 experts
    too_large = {shape for shape in shapes if _largest_size(metadata, shape) >= SIZE_LIMIT}
    problems = []
    owners: dict[str, str] = {}
    for name, module in metadata.modules.items():
        if too_large and module in too_large:
            problems.append(
                f"module {shown(name)}: its shape is too large, expected sizes below 2^63"
            )
        if module.experts is not None and name.endswith(TABLE_SUFFIX):
            problems.append(
                f"module {shown(name)}: the name of fused experts ends in {TABLE_SUFFIX!r}, which "
                f"only tables may have"
            )
        tensors = (module.index_map_name(name), module.table_name(name))
        taken = [tensor for tensor in tensors if owners.setdefault(tensor, name) != name]
        if taken:
            problems.append(
                f"modules {shown(owners[taken[0]])} and {shown(name)} both have a tensor "
                f"{shown(taken[0])}, expected a module for each tensor"
            )
    return problems


def _largest_size(metadata: SketchMetadata, module: SketchedModule) -> int:
    """Return the weights of a module or the bytes of one of its tensors, whichever are more."""
    index_map, table = module.tensors("", metadata.mapping, metadata.table_dtype)
    return max(module.weights, index_map.nbytes, table.nbytes)
