"""Print plans and reports as tables."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.table import Table

from spallm_convert.conversion.estimate import Estimate
from spallm_convert.conversion.report import Report
from spallm_convert.devices import CPU
from spallm_convert.effort import EFFORTS
from spallm_convert.sketch.plan import Plan
from spallm_convert.source.quantized.dense import quantization_remark
from spallm_convert.source.skeleton import numbers_starred

from .lines import say
from .terminal import print_table

_UNITS = (("hour", 3600), ("minute", 60), ("second", 1))


def print_plan(
    plan: Plan, estimate: Estimate | None, *, as_json: bool, totals_alone: bool = False
) -> None:
    """Print what a conversion would do, for `--dry-run`."""
    totals = plan.totals()
    for note in plan.notes:
        say(note, err=True)
    if plan.dense_warning is not None:
        say(plan.dense_warning, err=True)
    if as_json:
        modules = {name: asdict(module) for name, module in plan.metadata.modules.items()}
        document = {
            "totals": totals,
            "modules": modules,
            "left_dense": plan.left_dense,
            "estimate": None if estimate is None else asdict(estimate),
        }
        say(json.dumps(document, indent=2))
        return
    table = _table("layers", "shape", "bits", "groups", "bits per weight")
    mapping, dtype = plan.metadata.mapping, plan.metadata.table_dtype
    merged: dict[tuple[str, ...], int] = {}
    for name, module in plan.metadata.modules.items():
        row: tuple[str, ...] = (
            numbers_starred(name),
            f"{module.out_features} x {module.in_features}",
            str(module.bits),
            str(module.groups_per_row),
            f"{module.stored_bits_per_weight(mapping, dtype):.3f}",
        )
        merged[row] = merged.get(row, 0) + 1
    for row, count in merged.items():
        table.add_row(f"{count} x {row[0]}", *row[1:])
    if not totals_alone:
        print_table(table)
        _print_left_dense(plan.left_dense)
    _print_totals(totals)
    layers = [layer.weight for layer in plan.layers.values()]
    if (remark := quantization_remark([*layers, *plan.kept.values()])) is not None:
        say(remark)
    say(f"{len(plan.shards)} weight file(s) would be written")
    if estimate is not None:
        _print_estimate(estimate)


def print_report(report: Report) -> None:
    """Print the error and the size of every module, then the totals."""
    errors = {"relative_error": "weight error", "relative_output_error": "output error"}
    errors = {key: title for key, title in errors.items() if key in report.totals}
    bits = ["bits"] if len(report.widths) > 1 else []
    table = _table("layer", "shape", *bits, "groups", "bits per weight", *errors.values())
    for module in report.modules:
        table.add_row(
            module["name"],
            " x ".join(map(str, module["shape"])),
            *(str(module[key]) for key in bits),
            str(module["groups_per_row"]),
            f"{module['bits_per_weight']:.3f}",
            # The text does not reach every module, an embedding for example.
            *(f"{module[key]:.4f}" if key in module else "" for key in errors),
        )
    print_table(table)
    _print_left_dense(report.left_dense)
    _print_effort(report)
    _print_totals(report.totals, healed="healing" in report.document)
    _print_predicted(report.document.get("predicted_loss"))
    _print_healing(report.document.get("healing"))
    if (reason := report.document.get("not_calibrated")) is not None:
        say(f"not calibrated: {reason}")
    if (about := report.document.get("source_quantization")) is not None:
        say(
            f"{about['stored_bytes'] / 1e6:,.1f} MB of the source were quantized: {about['scheme']}"
        )


def _print_effort(report: Report) -> None:
    """Say what was done, unless it is said elsewhere that this was not possible."""
    options = report.document.get("options", {})
    level = EFFORTS.get(str(options.get("effort")))
    if level is None or "not_calibrated" in report.document:
        return
    text = ""
    read = [options.get(key) for key in ("samples", "seqlen", "calibration")]
    if level.reads_text and None not in read:
        text = " ({} x {} tokens of {})".format(*read)
    say(f"effort {options['effort']}: {level.what}{text}")


def _print_estimate(estimate: Estimate) -> None:
    if estimate.reason is not None:
        say(f"effort {estimate.effort} in place of {estimate.asked}: {estimate.reason}")
    threads = f"{estimate.threads} thread{'s' if estimate.threads > 1 else ''}"
    where = threads if estimate.device == CPU else f"{threads}, {estimate.device}"
    say(
        f"effort {estimate.effort}: {about(estimate.seconds)} on this machine ({where}), about "
        f"{estimate.memory_bytes / 1e9:.1f} GB of memory"
    )


def about(seconds: float) -> str:
    """Return a rough time in words, such as "about 2 minutes"."""
    unit, size = next((u, s) for u, s in _UNITS if seconds >= 1.5 * s or s == 1)
    count = seconds / size
    rounded = max(1, round(count, 1 if unit == "hour" and count < 10 else None))
    return f"about {rounded:g} {unit}{'' if rounded == 1 else 's'}"


def _print_healing(healing: dict[str, float] | None) -> None:
    if healing is not None:
        say(
            f"healed: divergence from the dense model {healing['kl_before']:.4f} -> "
            f"{healing['kl_after']:.4f} nats per token, on held-out samples"
        )


def _table(first: str, *others: str) -> Table:
    """Return a table whose columns are as narrow as the words of their titles.

    Names and shapes are never wrapped. Those of Llama's layers fit into 80 columns.
    """
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold cyan")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=name == "shape")
    return table


def _print_left_dense(left_dense: dict[str, str]) -> None:
    merged: dict[tuple[str, str], int] = {}
    for name, why in left_dense.items():
        key = (numbers_starred(name), why)
        merged[key] = merged.get(key, 0) + 1
    for (name, why), count in merged.items():
        say(f"left dense: {count} x {name}: {why}")


def _print_totals(totals: dict[str, Any], *, healed: bool = False) -> None:
    share = totals["sketched_weights"] / (totals["sketched_weights"] + totals["kept_weights"])
    ratio = totals["ratio"]
    change = f"{ratio:.2f} times smaller" if ratio >= 1 else f"{1 / ratio:.2f} times larger"
    say(
        f"{totals['sketched_weights']:,} weights sketched ({share:.1%} of the model) at "
        f"{totals['bits_per_weight']:.3f} bits each, tables included"
    )
    say(
        f"{totals['source_bytes'] / 1e6:,.1f} MB -> {totals['sketched_bytes'] / 1e6:,.1f} MB "
        f"({change})"
    )
    if "relative_error" in totals:
        say(f"relative error of the sketched weights: {totals['relative_error']:.4f}")
    if "relative_output_error" in totals:
        error, when = totals["relative_output_error"], ", before healing" if healed else ""
        say(f"relative error of their outputs on the calibration text{when}: {error:.4f}")


def _print_predicted(losses: dict[str, float] | None) -> None:
    if losses is None:
        return
    uniform = ", ".join(
        f"{loss:.4f} at {bits} bits" for bits, loss in losses.items() if bits != "chosen"
    )
    say(f"predicted loss of the chosen bits: {losses['chosen']:.4f} nats per token ({uniform})")
