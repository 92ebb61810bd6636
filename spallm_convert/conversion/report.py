"""Write and read `conversion.json`: what was converted, how, and how large the error is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spallm_convert.paths import user_path
from spallm_convert.sketch.plan import Plan
from spallm_formats import FormatError, is_inside, read_json

REPORT_FILE = "conversion.json"

#: The largest number that a report may hold; numbers are printed with four decimals and divided.
_MOST = 1e300


@dataclass(frozen=True)
class Report:
    """Hold the report of a conversion, a parsed `conversion.json`.

    Attributes:
        document: The whole report, a JSON object. Besides the parts that have a property here, it
            holds `options`, `versions` and `format_version`. With calibration it also holds
            `device` and digests of the tokens, or `not_calibrated` with the reason if the fallback
            was used. It holds `partly_calibrated` with the layers that are not calibrated, and
            `experts` with the number of experts that few tokens reach, if there are any.
            With `target_bits` it holds `predicted_loss`: predicted KL(dense || sketched)
            in nats per token, for the `chosen` bits and for "2", "3" and "4" bits in every layer.
            If the source is quantized it holds `source_quantization`: `method`, `scheme`, number of
            quantized `weights`, `stored_bytes` of the source's tensors, and number of tensors that
            were `dropped`, such as scales of activations.
            With healing it holds `healing`: the same divergence, measured on samples that were left
            out, as `kl_before` and `kl_after`.
    """

    document: dict[str, Any]

    @property
    def totals(self) -> dict[str, Any]:
        """Return the sizes and errors of the whole model.

        Returns:
            A dict with `sketched_weights` and `kept_weights` (numbers of weights),
            `bits_per_weight` (of the sketched weights, tables and padding included), `source_bytes`
            and `sketched_bytes` (bytes of all tensors; a quantized source counts with its dense
            size), `ratio` (source bytes per sketched byte) and `relative_error` (Frobenius norm,
            over all sketched weights). With calibration it also has `relative_output_error`, on the
            calibration text and before any healing.
        """
        totals: dict[str, Any] = self.document["totals"]
        return totals

    @property
    def modules(self) -> list[dict[str, Any]]:
        """Return a dict for each sketched module.

        Returns:
            Dicts with `name`, `shape` ([out_features, in_features]), `bits`, `groups_per_row`,
            `bits_per_weight` and `relative_error`, and if the module is calibrated
            `relative_output_error`.
        """
        modules: list[dict[str, Any]] = self.document["modules"]
        return modules

    @property
    def widths(self) -> list[int]:
        """Return the bits per code that occur, ascending (with a recipe or a target, several)."""
        return sorted({module["bits"] for module in self.modules})

    @property
    def source(self) -> dict[str, Any]:
        """Return what was converted.

        Returns:
            A dict with `model` (id on the Hub, or name of the folder or file), `revision` (commit,
            or None), `license` (as its model card states it, or None) and `files` (SHA-256 by
            name).
        """
        source: dict[str, Any] = self.document["source"]
        return source

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Return a dict with `sha256` and `bytes` for each file, by name, without the report."""
        files: dict[str, dict[str, Any]] = self.document["files"]
        return files

    def has_identity(self, same: dict[str, Any]) -> bool:
        """Return whether this is the report of a certain conversion.

        Args:
            same: Identity of the conversion, from `identity`.
        """
        return all(self.document.get(key) == value for key, value in same.items())

    @property
    def left_dense(self) -> dict[str, str]:
        """Return the reason for each layer that was not sketched, by its name."""
        left_dense: dict[str, str] = self.document["left_dense"]
        return left_dense

    @classmethod
    def read(cls, folder: str | Path) -> Report | None:
        """Read the report in a folder.

        Args:
            folder: Folder of a sketched checkpoint.

        Returns:
            The report; None if the folder has none.

        Raises:
            FormatError: If it is damaged, or was written by a version with other reports.
        """
        path = user_path(folder) / REPORT_FILE
        if not path.is_file():
            return None
        document = read_json(path)
        if not _is_report(document):
            raise FormatError(
                f"{REPORT_FILE}: not a report of a conversion that this version of spallm-convert "
                f"reads; get the file again, or convert the model again"
            )
        return cls(document)


def _is_number(value: Any) -> bool:
    """Return whether a value is a number that can be printed and computed with (True is none)."""
    return type(value) in {int, float} and -_MOST <= value <= _MOST


def _is_size(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MOST


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


_Checks = dict[str, Callable[[Any], bool]]
_DOCUMENT: _Checks = {
    **dict.fromkeys(("source", "options", "versions", "totals", "files", "left_dense"), _is_object),
    "modules": _is_list,
}
_TOTALS: _Checks = {
    "sketched_weights": _is_positive,
    "bits_per_weight": _is_positive,
    "ratio": _is_positive,
    **dict.fromkeys(("kept_weights", "source_bytes", "sketched_bytes", "relative_error"), _is_size),
}
_MODULE: _Checks = {
    "name": _is_text,
    "shape": _is_shape,
    "bits": _is_count,
    "groups_per_row": _is_count,
    "bits_per_weight": _is_positive,
    "relative_error": _is_size,
}
_OUTPUTS: _Checks = {"relative_output_error": _is_size}  # of calibrated modules
#: Parts that only some reports have, and the numbers that each of them must hold.
_NUMBERS = {"predicted_loss": {"chosen"}, "healing": {"kl_before", "kl_after"}}
#: The part about a quantized source, and what is checked if a report has none.
_QUANTIZATION: _Checks = {"scheme": _is_text, "stored_bytes": _is_size}
_DENSE = {"scheme": "dense", "stored_bytes": 0}
_TEXTS = (
    "not_calibrated",
    "partly_calibrated",
    "experts",
    "device",
    "calibration_tokens",
    "healing_tokens",
)


def _is_report(document: Any) -> bool:
    """Return whether a parsed file has every part of a report that is read, as it can be shown."""
    if not _has(document, _DOCUMENT):
        return False
    return (
        _has(document["totals"], _TOTALS | _known(document["totals"]))
        and all(
            _has_numbers(document[key], names) for key, names in _NUMBERS.items() if key in document
        )
        and all(_is_text(document[key]) for key in _TEXTS if key in document)
        and _has(document.get("source_quantization", _DENSE), _QUANTIZATION)
        and _is_text(document["source"].get("model"))
        and all(is_inside(name) for name in document["files"])
        and all(_has(file, {"sha256": _is_text}) for file in document["files"].values())
        and all(_has(module, _MODULE | _known(module)) for module in document["modules"])
        and all(map(_is_text, document["left_dense"].values()))
    )


def _known(value: Any) -> _Checks:
    """Return checks of the errors of outputs, if there are any; not all modules are calibrated."""
    return {key: check for key, check in _OUTPUTS.items() if _is_object(value) and key in value}


def _has(value: Any, checks: _Checks) -> bool:
    """Return whether a value is an object whose values under these keys pass their checks."""
    return _is_object(value) and all(check(value.get(key)) for key, check in checks.items())


def _has_numbers(value: Any, names: set[str]) -> bool:
    """Return whether a value is an object of numbers that has these keys."""
    return _is_object(value) and names <= value.keys() and all(map(_is_number, value.values()))


def make_report(
    plan: Plan,
    identity: dict[str, Any],
    records: dict[str, Any],
    healing: dict[str, float] | None = None,
) -> Report:
    """Make the report of a conversion.

    Args:
        plan: What was written.
        identity: What decided its bytes.
        records: Record of each shard by file name, with `sha256`, `bytes` and `modules`: sums for
            each module, from `write_shard`.
        healing: Divergence before and after healing, None without healing.

    Returns:
        The report. Files other than shards are still missing.
    """
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
    columns = itertools.zip_longest(*sums.values(), fillvalue=0.0)  # some are not calibrated
    totals = [math.fsum(column) for column in columns]
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
    """Return relative errors from sums of squares: of the weights and, if calibrated, outputs."""
    names = ("relative_error", "relative_output_error")
    pairs = zip(sums[::2], sums[1::2], strict=True)
    return {name: _relative(*pair) for name, pair in zip(names, pairs, strict=False)}


def _relative(error: float, norm: float) -> float:
    """Return ||W - sketch|| / ||W|| (Frobenius) from sums of squares; 0 if W is all zeros."""
    return math.sqrt(max(error, 0.0) / norm) if norm > 0 else 0.0  # rounding may make sums negative
