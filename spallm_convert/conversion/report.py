"""`conversion.json`: what was converted, how, and how large the error is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spallm_convert.paths import user_path
from spallm_convert.sketch.plan import Plan
from spallm_formats import FormatError, load_json
from spallm_formats.staging import is_inside

REPORT_FILE = "conversion.json"

_DOCUMENT: dict[str, Any] = {
    "source": dict,
    "options": dict,
    "versions": dict,
    "totals": dict,
    "files": dict,
    "modules": list,
    "left_dense": dict,
}
_TOTALS = (
    "sketched_weights",
    "kept_weights",
    "bits_per_weight",
    "source_bytes",
    "sketched_bytes",
    "ratio",
    "relative_error",
)
_NUMBERS = {"predicted_loss": {"chosen"}, "healing": {"kl_before", "kl_after"}}  # if there at all
_OUTPUTS = {"relative_output_error": int | float}  # of modules that were calibrated
_MODULE: dict[str, Any] = {
    "name": str,
    "shape": list,
    "bits": int,
    "groups_per_row": int,
    "bits_per_weight": int | float,
    "relative_error": int | float,
}


@dataclass(frozen=True)
class Report:
    """A parsed `conversion.json`.

    `totals` has sketched_weights, kept_weights, bits_per_weight, source_bytes, sketched_bytes,
    ratio and relative_error; `modules` one object per sketched module. Both have
    relative_output_error, on the calibration text and before any healing, if the conversion was
    calibrated. With `target_bits` the document has predicted_loss: nats per token of
    KL(dense || sketched) as "chosen", and for "2", "3" and "4" bits throughout; if it was healed,
    healing: the same divergence as measured on samples left out, "kl_before" and "kl_after".
    """

    document: dict[str, Any]

    @property
    def totals(self) -> dict[str, Any]:
        totals: dict[str, Any] = self.document["totals"]
        return totals

    @property
    def modules(self) -> list[dict[str, Any]]:
        modules: list[dict[str, Any]] = self.document["modules"]
        return modules

    @property
    def widths(self) -> list[int]:
        """The bits per code that there are, ascending: several where `target_bits` chose them."""
        return sorted({module["bits"] for module in self.modules})

    @property
    def source(self) -> dict[str, Any]:
        source: dict[str, Any] = self.document["source"]
        return source

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Every file of the checkpoint but this report -> its "sha256" and "bytes"."""
        files: dict[str, dict[str, Any]] = self.document["files"]
        return files

    def has_identity(self, same: dict[str, Any]) -> bool:
        """Whether this is the report of a conversion with that `identity`."""
        return all(self.document.get(key) == value for key, value in same.items())

    @property
    def left_dense(self) -> dict[str, str]:
        left_dense: dict[str, str] = self.document["left_dense"]
        return left_dense

    @classmethod
    def read(cls, folder: str | Path) -> Report | None:
        """The report in a folder; None when there is none. Raises FormatError when damaged."""
        path = user_path(folder) / REPORT_FILE
        if not path.is_file():
            return None
        document = load_json(path.read_bytes(), REPORT_FILE)
        if not _is_report(document):
            raise FormatError(
                f"{REPORT_FILE}: is no report of a conversion that this version reads"
            )
        return cls(document)


def _is_report(document: Any) -> bool:
    """Whether a parsed file has everything that is read of a report, in the right types."""
    if not _has(document, _DOCUMENT):
        return False
    outputs = {key: kind for key, kind in _OUTPUTS.items() if key in document["totals"]}
    return (
        _has(document["totals"], dict.fromkeys(_TOTALS, int | float) | outputs)
        and document["totals"]["sketched_weights"] > 0
        and all(
            _has_numbers(document[key], names) for key, names in _NUMBERS.items() if key in document
        )
        and isinstance(document["source"].get("model"), str)
        and all(is_inside(name) for name in document["files"])
        and all(_has(file, {"sha256": str}) for file in document["files"].values())
        and all(_has(module, _MODULE | outputs) for module in document["modules"])
        and all(isinstance(reason, str) for reason in document["left_dense"].values())
    )


def _has(value: Any, types: dict[str, Any]) -> bool:
    """Whether a value is an object with these keys, their values of these types."""
    return isinstance(value, dict) and all(
        isinstance(value.get(key), kind) for key, kind in types.items()
    )


def _has_numbers(value: Any, names: set[str]) -> bool:
    """Whether a value is an object of numbers, these among them."""
    return (
        isinstance(value, dict)
        and names <= value.keys()
        and all(isinstance(number, int | float) for number in value.values())
    )


def make_report(
    plan: Plan,
    identity: dict[str, Any],
    records: dict[str, Any],
    healing: dict[str, float] | None = None,
) -> Report:
    """Assembles the report from the records of all shards, each {"sha256", "bytes", "modules"}."""
    sums = {name: pair for record in records.values() for name, pair in record["modules"].items()}
    modules = [
        {
            "name": name,
            "shape": [module.out_features, module.in_features],
            "bits": module.bits,
            "groups_per_row": module.groups_per_row,
            "bits_per_weight": module.stored_bits_per_weight(
                plan.metadata.mapping, plan.metadata.table_dtype
            ),
            **_errors(sums[name]),
        }
        for name, module in plan.metadata.modules.items()
    ]
    totals = [math.fsum(column) for column in zip(*sums.values(), strict=True)]
    return Report(
        identity
        | ({} if healing is None else {"healing": healing})
        | {
            "totals": plan.totals() | _errors(totals),
            "files": {
                name: {"sha256": record["sha256"], "bytes": record["bytes"]}
                for name, record in records.items()
            },
            "left_dense": plan.left_dense,
            "modules": modules,
        }
    )


def _errors(sums: Sequence[float]) -> dict[str, float]:
    """Relative errors from squared errors and norms of weights, and of outputs if calibrated."""
    names = ("relative_error", "relative_output_error")
    pairs = zip(sums[::2], sums[1::2], strict=True)
    return {name: _relative(*pair) for name, pair in zip(names, pairs, strict=False)}


def _relative(error: float, norm: float) -> float:
    """||W - sketch|| / ||W|| (Frobenius) from squared sums; 0 for a weight that is all zeros."""
    return math.sqrt(error / norm) if norm else 0.0
