"""Parse and write `quantization_config`, which lists the sketched modules of a checkpoint.

The list is exact: a module is sketched if and only if it is listed, with every number that a reader
needs to decode it. Nothing is inferred from name patterns or skip lists. Unknown keys are refused,
because they could change the meaning of the known ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from .dtypes import TABLE_DTYPES
from .errors import FormatError
from .header import TensorSpec
from .packing import MAX_BITS, row_bytes
from .text import shown

QUANT_METHOD = "spallm"
FORMAT_VERSION = 1
MAPPINGS = ("cluster", "hash")
INDEX_MAP_SUFFIX = ".weight"
TABLE_ENDING = "_table"
TABLE_SUFFIX = INDEX_MAP_SUFFIX + TABLE_ENDING


@dataclass(frozen=True, kw_only=True)
class SketchedModule:
    """Hold the shape of one sketched linear layer, or of all experts in one fused tensor.

    Attributes:
        in_features: Columns of the weight.
        out_features: Rows of the weight, or of each expert's.
        bits: Bits of a code, 1 to 8.
        groups_per_row: Tables per row; divides in_features.
        experts: Number of experts whose weights are fused in one tensor. None: the module is one
            linear layer.
        transposed: Whether the source stores the weight, or each expert's, with a row per input.
    """

    in_features: int
    out_features: int
    bits: int
    groups_per_row: int
    experts: int | None = None
    transposed: bool = False

    @property
    def rows(self) -> int:
        """Return the number of rows, those of all experts together."""
        return self.out_features * (1 if self.experts is None else self.experts)

    @property
    def entries(self) -> int:
        """Return the entries of one sketch table, which serves one group of one row."""
        return 1 << self.bits

    @property
    def weights(self) -> int:
        """Return the number of weights."""
        return self.in_features * self.rows

    @property
    def table_shape(self) -> tuple[int, ...]:
        """Return the shape of the tables, (out_features, groups_per_row, entries).

        The number of experts stands before it if there are any.
        """
        return *self._leading, self.out_features, self.groups_per_row, self.entries

    @property
    def _leading(self) -> tuple[int, ...]:
        return () if self.experts is None else (self.experts,)

    def index_map_name(self, name: str) -> str:
        """Return the name of the module's index map, given the name of the module.

        A layer's weight is a tensor of its module. Fused experts are a tensor, whose own name is
        that of the module.
        """
        return name + INDEX_MAP_SUFFIX if self.experts is None else name

    def table_name(self, name: str) -> str:
        """Return the name of the module's tables, given the name of the module."""
        return self.index_map_name(name) + TABLE_ENDING

    def stored_bits_per_weight(self, mapping: str, table_dtype: str) -> float:
        """Return the bits on disk per weight of this module: index map with padding, plus tables.

        Args:
            mapping: "cluster" or "hash".
            table_dtype: "bfloat16", "float16" or "float32".
        """
        specs = self.tensors("module", mapping, table_dtype)
        return 8 * sum(spec.nbytes for spec in specs) / self.weights

    def tensors(self, name: str, mapping: str, table_dtype: str) -> tuple[TensorSpec, TensorSpec]:
        """Return the index map and the table of this module as they are stored.

        Args:
            name: Path of the module in the model.
            mapping: "cluster" or "hash".
            table_dtype: "bfloat16", "float16" or "float32".
        """
        packed = row_bytes(self.in_features, self.bits) if mapping == "cluster" else 0
        shape = (*self._leading, self.out_features, packed)
        return (
            TensorSpec(self.index_map_name(name), "U8", shape),
            TensorSpec(self.table_name(name), TABLE_DTYPES[table_dtype], self.table_shape),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the module's object in `quantization_config`."""
        document = asdict(self)
        if self.experts is None:
            del document["experts"]
        if not self.transposed:
            del document["transposed"]
        return document


@dataclass(frozen=True, kw_only=True)
class SketchMetadata:
    """Hold a parsed and checked `quantization_config`.

    Attributes:
        mapping: "cluster" (the index map is stored) or "hash" (it is computed from `hash_seed`).
        table_dtype: "bfloat16", "float16" or "float32".
        modules: Sketched modules by their path in the transformers model.
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
        return cls(
            mapping=document["mapping"],
            table_dtype=document["table_dtype"],
            hash_seed=document["hash_seed"],
            modules={
                name: SketchedModule(**module) for name, module in document["modules"].items()
            },
        )


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
        return [f"{where}: expected a module path and an object"]
    problems = _key_problems(where, module, _MODULE, _OPTIONAL)
    if not problems and module["in_features"] % module["groups_per_row"]:
        problems.append(
            f"{where}: groups_per_row {module['groups_per_row']} does not divide "
            f"in_features {module['in_features']}"
        )
    return problems
