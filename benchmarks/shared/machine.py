"""Describe machine, versions and memory for all benchmarks, compute quantiles and write results."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spallm_formats import to_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
_STATUS = Path("/proc/self/status")
_STAT = Path("/proc/stat")
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def cores() -> int:
    """Return the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Describe the machine, as far as results depend on it."""
    return {"cpu": _cpu_model(), "cores": cores(), "platform": platform.platform()}


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of installed packages."""
    found = {package: importlib.metadata.version(package) for package in packages}
    return {"python": platform.python_version()} | found


def module_environment() -> dict[str, str]:
    """Return this process's environment with this checkout on the path of `python -m`."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process; outside Linux its peak, which is never reset."""
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def peak_of_any() -> int:
    """Return the peak memory of this process or of its largest ended child, whichever is more."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _MAXRSS_UNIT
    return max(resident("VmHWM"), children)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its ended children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Load:
    """Measure how busy other processes have kept the cores since this object was made."""

    def __init__(self) -> None:
        self._start = self._now()

    def elsewhere(self) -> float | None:
        """Return the share of all cores that other processes took; None outside Linux.

        Programs that this process has started count as others until they end.
        """
        if not _STAT.exists():
            return None
        busy, own, wall = (now - start for now, start in zip(self._now(), self._start, strict=True))
        return max(0.0, (busy - own) / (wall * (os.cpu_count() or 1)))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Return seconds: of all processes on all cores, of this process, and of the clock."""
        busy = 0.0
        if _STAT.exists():
            ticks = [int(word) for word in _STAT.read_text().splitlines()[0].split()[1:9]]
            idle, waiting = ticks[3:5]
            busy = (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK")
        return busy, cpu_seconds(), time.perf_counter()


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """Return the median and a lower and an upper quantile, which a few outliers do not change."""
    levels = {"p20": 0.2, "p50": 0.5, "p80": 0.8}
    return {name: float(np.quantile(samples, level)) for name, level in levels.items()}


def write_results(path: Path, document: dict[str, Any]) -> None:
    """Write JSON, making the folder if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_json(document))


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
