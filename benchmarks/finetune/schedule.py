"""Plan the runs of the fine-tuning benchmark, and summarise them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.shared.processes import Row

from .methods import METHODS


def rates_of(kind: str, chosen: dict[str, tuple[float, ...]]) -> tuple[float, ...]:
    """Return the learning rates of a kind of method; QLoRA's are LoRA's."""
    return chosen["lora" if kind == "qlora" else kind]


def key(row: Row) -> tuple[str, float | None]:
    """Return what identifies a run. Before training, methods of one base are the same."""
    rate = row["learning_rate"]
    return (row["base"] if rate is None else row["method"], rate)


def planned(
    methods: Sequence[str], chosen: dict[str, tuple[float, ...]], *, quality: bool
) -> list[Row]:
    """Return the runs in order. Without quality: one rate, and no run before training."""
    runs: dict[tuple[str, float | None], Row] = {}
    for name in methods:
        rates = rates_of(METHODS[name].kind, chosen)
        for rate in (None, *rates) if quality else rates[:1]:
            run = {"method": name, "base": METHODS[name].base, "learning_rate": rate}
            runs.setdefault(key(run), run)
    return list(runs.values())


def summarise(runs: Iterable[Row]) -> list[Row]:
    """Return each method at the rate of its lowest held-out loss, the best first.

    A rate at the end of the range may not be the best of the method; `rate_at_end` marks it.
    Without held-out losses all runs are listed.
    """
    runs = [run for run in runs if run["learning_rate"] is not None and not run["diverged"]]
    if not any("held_out" in run for run in runs):
        return [_summary(run, [run]) for run in runs]
    by_method: dict[str, list[Row]] = {}
    for run in runs:
        if run["held_out"]["loss"] is not None:
            by_method.setdefault(run["method"], []).append(run)
    best = [
        _summary(min(tried, key=lambda run: run["held_out"]["loss"]), tried)
        for tried in by_method.values()
    ]
    return sorted(best, key=lambda row: row["held_out_loss"])


def _summary(run: Row, tried: Sequence[Row]) -> Row:
    held_out = run.get("held_out", {})
    rates = sorted(row["learning_rate"] for row in tried)
    return {
        "method": run["method"],
        "learning_rate": run["learning_rate"],
        "rate_at_end": run["learning_rate"] in (rates[0], rates[-1]),
        "held_out_loss": held_out.get("loss"),
        "option_loss": held_out.get("option_loss"),
        "accuracy": held_out.get("accuracy"),
        "trainable_parameters": run["trainable_parameters"],
        "rank": run.get("rank"),
        "model_bytes": run["model_bytes"],
        "peak_bytes": run["memory"]["peak_bytes"],
        "rise_bytes": run["memory"]["rise_bytes"],
        "tokens_per_second": run.get("tokens_per_second", {}).get("p50"),
    }
