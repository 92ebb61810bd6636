"""Run sections of the GPU suite in turn within a budget of seconds, and keep their results.

A section is a list of tasks, and each task gives a row. The document is written after every row, so
that measured rows are kept whatever happens later. If a task raises an error, it is recorded and
the next task begins. If a task hangs or leaves the device unusable, the process ends, and
`__main__.py` starts another for the remaining sections.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.shared.machine import write_results
from spallm_kernels import choose_backend

from .bars import add_shares, judge
from .conversion import conversion
from .experts import experts
from .layers import block, ceilings, forward, widths
from .model import model
from .numerics import numerics
from .operands import Task, UnavailableError
from .rivals import nf4, published
from .tenants import affine, tenants
from .timing import Bench
from .training import backward, memory

UNUSABLE = 3  # exit code of a process whose device no longer answers

_MESSAGE = 1000  # characters: a compiler's error may hold a whole program
_TASK_SECONDS = 180  # of a task; more means that it hangs


class Section(NamedTuple):
    """Hold measurements, and the seconds that must be left for them to be worth starting."""

    tasks: Callable[[Bench], Sequence[Task]]
    least_seconds: float


#: The most important first.
SECTIONS = {
    "ceilings": Section(ceilings, 5),
    "forward": Section(forward, 20),
    "block": Section(block, 10),
    "widths": Section(widths, 10),
    "backward": Section(backward, 15),
    "memory": Section(memory, 10),
    "published": Section(published, 15),
    "model": Section(model, 60),
    "numerics": Section(numerics, 10),
    "tenants": Section(tenants, 15),
    "affine": Section(affine, 10),
    "experts": Section(experts, 10),
    "conversion": Section(conversion, 60),
    "nf4": Section(nf4, 15),
}


def run_sections(
    names: Sequence[str], bench: Bench, document: dict[str, Any], output: Path, deadline: float
) -> bool:
    """Add sections to the document and write it; `deadline` is on the monotonic clock.

    Return False if the device became unusable: the remaining sections need a new process.
    """
    document["device"] = describe(bench)
    for name in names:
        section = SECTIONS[name]
        record: dict[str, Any] = {"status": "running", "rows": [], "errors": []}
        document["sections"][name] = record
        begin = time.monotonic()
        if deadline - begin < section.least_seconds:
            record["status"] = "not run: out of time"
        else:
            record["status"] = _run(section, bench, record, document, output, deadline)
        record["seconds"] = round(time.monotonic() - begin, 2)
        record.pop("running", None)
        save(document, output)
        print(f"{name:10} {record['seconds']:6.1f} s  {record['status']}", flush=True)
        if not bench.is_usable():
            return False
    return True


def _run(
    section: Section,
    bench: Bench,
    record: dict[str, Any],
    document: dict[str, Any],
    output: Path,
    deadline: float,
) -> str:
    """Do the tasks of a section; return its status."""
    try:
        tasks = section.tasks(bench)
    except UnavailableError as reason:
        return f"not run: {reason}"
    for number, task in enumerate(tasks):
        if time.monotonic() > deadline:
            return f"cut short: out of time after {number} of {len(tasks)}"
        record["running"] = task.name
        save(document, output)
        faulthandler.dump_traceback_later(_TASK_SECONDS, exit=True)
        try:
            record["rows"].append(task.run())
        except Exception as error:
            record["errors"].append(failure(task.name, f"{type(error).__name__}: {error}"))
            traceback.print_exc()
        faulthandler.cancel_dump_traceback_later()
        if not bench.is_usable():
            record["errors"].append(failure(task.name, "the device no longer answers"))
            return "failed"
        bench.collect()
    return "failed" if record["errors"] else "done"


def failure(task: str, message: str) -> dict[str, str]:
    return {"task": task, "error": message[:_MESSAGE]}


def save(document: dict[str, Any], output: Path) -> None:
    """Write the document with its bars, whole or not at all: the process may end at any time."""
    add_shares(document["sections"])
    document["bars"] = judge(document["sections"])
    part = output.with_suffix(".part")
    write_results(part, document)
    part.replace(output)


def describe(bench: Bench) -> dict[str, Any]:
    """Describe the device, as far as results depend on it, and the backend that serves it."""
    found: dict[str, Any] = {
        "backend": choose_backend(bench.device),
        "kind": bench.device.type,
        "samples": bench.samples,
    }
    if not bench.has_gpu:
        return found
    properties = torch.cuda.get_device_properties(bench.device)
    return found | {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        **_driver(),
    }


def _driver() -> dict[str, str]:
    """Return what only the driver's own tool knows. It only reads, and changes no setting."""
    fields = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return dict.fromkeys(fields, "unknown: no nvidia-smi")
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    try:
        answer = subprocess.run(
            [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", device],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return dict.fromkeys(fields, f"unknown: {error}")
    values = [value.strip() for value in answer.stdout.strip().split(",")]
    if answer.returncode or len(values) != len(fields):
        return dict.fromkeys(fields, f"unknown: {(answer.stderr or answer.stdout).strip()}")
    return dict(zip(fields, values, strict=True))
