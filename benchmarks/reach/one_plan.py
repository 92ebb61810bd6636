"""Plan one published model from made-up headers; `python -m benchmarks.reach` starts this."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.shared.machine import resident, write_results
from spallm_convert import SketchConfig
from spallm_convert.conversion.loadable import checked_plan
from spallm_convert.sketch.plan import Plan

from .headers import made_up
from .models import Published


def measure(published: Published, folder: Path) -> dict[str, Any]:
    """Plan a model as `--dry-run` does; return sizes, seconds and peak memory.

    Args:
        published: The model.
        folder: A folder for its config.
    """
    checkpoint = made_up(published, folder)
    before = resident("VmHWM")
    start = time.perf_counter()
    plan = checked_plan(checkpoint, SketchConfig(effort="fast", **published.sketch), False)
    seconds = time.perf_counter() - start
    return figures(plan) | {
        "hub": published.hub,
        "options": published.sketch,
        "tensors": len(checkpoint.tensors),
        "seconds": seconds,
        "peak_resident_bytes": resident("VmHWM"),
        "peak_resident_bytes_before": before,
    }


def figures(plan: Plan) -> dict[str, Any]:
    """Return the sizes of a plan, the share of linear weights, and what stays dense."""
    dense = sum(plan.dense_weights.values())
    return plan.totals() | {
        "linear_share": plan.sketched_weights / (plan.sketched_weights + dense),
        "dense": {
            kind: {"weights": count, "reason": plan.dense_reasons[kind]}
            for kind, count in sorted(plan.dense_weights.items(), key=lambda item: -item[1])
        },
    }


def main() -> None:
    """Read a model from the first file, write the figures to the second."""
    job, result = map(Path, sys.argv[1:])
    published = Published(**json.loads(job.read_text()))
    with tempfile.TemporaryDirectory() as folder:
        write_results(result, measure(published, Path(folder)))


if __name__ == "__main__":
    main()
