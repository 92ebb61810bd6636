"""Find out what runs where on this machine, and check that the kernels are right there."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from spallm_convert.errors import one_line
from spallm_convert.version import __version__
from spallm_kernels.cpu.vector_units import PORTABLE, host_unit
from spallm_kernels.dispatch import (
    check_gpu,
    choose_backend,
    choose_path,
    load_decoder,
    why_reference,
)
from spallm_kernels.fallback import SWITCH
from spallm_kernels.self_check import find_fault

from .throughput import BITS, FEATURES, GROUPS, Throughput, measure

#: Numbers of tokens for which backend and path are named: one step of generation, a small batch,
#: a prompt.
TOKENS = (1, 8, 512)
_WIDTHS = (2, 3, 4)
_PACKAGES = ("torch", "numba", "triton", "transformers")
#: Features of a CPU that kernels make use of, by LLVM's name.
_FEATURES = {"avx2": "AVX2", "avx512f": "AVX-512", "neon": "NEON"}
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Describe a GPU as torch sees it."""

    device: str
    name: str
    capability: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Check:
    """Hold the verdict on the kernels of one backend, at one width."""

    device: str
    backend: str
    bits: int
    fault: str | None


@dataclass(frozen=True, kw_only=True)
class Route:
    """Name what computes a layer of 4096 x 4096 with this number of tokens in bfloat16."""

    device: str
    tokens: int
    backend: str
    path: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Hold what is known of a machine. `problems` has a line for each thing that should be mended.

    Versions are None for packages that are not installed.
    """

    versions: dict[str, str | None]
    cpu: dict[str, Any]
    gpus: list[Gpu]
    check_is_on: bool
    checks: list[Check] = field(default_factory=list)
    routes: list[Route] = field(default_factory=list)
    throughput: list[Throughput] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def diagnose() -> Diagnosis:
    """Describe this machine, check the kernels of every device, and time one layer on each."""
    found = Diagnosis(
        versions=_versions(),
        cpu=_cpu(),
        gpus=_gpus(),
        check_is_on=os.environ.get(SWITCH) != "0",
    )
    for device in [_CPU, *(torch.device(gpu.device) for gpu in found.gpus)]:
        try:
            problems = _check(device, found.checks)
            found.problems.extend(problems)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # the problems say the same
                found.routes.extend(_route(device, tokens) for tokens in TOKENS)
                found.throughput.append(measure(device))
        except RuntimeError as error:  # the device is full or lost
            found.problems.append(f"{device}: {one_line(error)}; free it, or choose another device")
    return found


def cpu_path() -> str:
    """Return the vector unit that looks tables up on the CPU, or `portable`."""
    unit = host_unit()
    return PORTABLE if unit is None else unit.name


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "spallm-convert": __version__,
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _cpu() -> dict[str, Any]:
    import llvmlite.binding as llvm

    try:
        name, has = llvm.get_host_cpu_name(), llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know this CPU
        name, has = platform.machine(), {}
    features = [title for feature, title in _FEATURES.items() if has.get(feature)]
    return {
        "name": name,
        "features": features,
        "threads": torch.get_num_threads(),
        "path": cpu_path(),
    }


def _gpus() -> list[Gpu]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = []
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        gpus.append(
            Gpu(
                device=f"cuda:{number}",
                name=properties.name,
                capability=f"{properties.major}.{properties.minor}",
                memory_bytes=properties.total_memory,
            )
        )
    return gpus


def _check(device: torch.device, checks: list[Check]) -> list[str]:
    """Check the kernels of a device at every width, add the verdicts, and return the problems."""
    problems: dict[str, None] = {}  # in order, each once
    for bits in _WIDTHS:
        if device.type == "cpu":
            found = find_fault(load_decoder("cpu"), device, bits)
            faults = {"cpu": None if found is None else found.text}
        elif (obstacle := why_reference(device, bits)) is not None:
            problems[_slow(device, obstacle)] = None
            continue
        else:
            faults = check_gpu(device, bits)
        for backend, fault in faults.items():
            checks.append(Check(device=str(device), backend=backend, bits=bits, fault=fault))
            if fault is not None:
                problems[_wrong(device, backend, fault)] = None
    return [*problems]


def _slow(device: torch.device, obstacle: str) -> str:
    remedy = "" if "is not installed" in obstacle else "; use the CPU or another GPU"
    return f"{device}: sketched layers run on slow reference code: {obstacle}{remedy}"


def _wrong(device: torch.device, backend: str, fault: str) -> str:
    mend = "numba" if device.type == "cpu" else "torch and Triton"
    return (
        f"{device}: kernels of backend {backend!r} failed their check: {fault}; install other "
        f"versions of {mend}, then run this command again"
    )


def _route(device: torch.device, tokens: int) -> Route:
    backend = choose_backend(device, BITS)
    x = torch.empty(tokens, FEATURES, dtype=torch.bfloat16, device=device)
    table = torch.empty(1, GROUPS, 1 << BITS, dtype=torch.bfloat16, device=device)
    path = choose_path(backend, x, table)
    return Route(device=str(device), tokens=tokens, backend=backend, path=path)
