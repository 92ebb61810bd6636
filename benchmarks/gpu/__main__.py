"""Run everything that needs a GPU: the tests marked `gpu`, then all measurements.

Measurements run in a separate process. If it dies, another one is started for the rest. Results are
written as they come. `bars` lists what must be shown, each with its figure.

    make gpu        or        python -m benchmarks.gpu --output FILE
    python -m benchmarks.gpu --sections forward,block --no-tests --output FILE
    python -m benchmarks.gpu --smoke        tiny, on the CPU, no valid figures: tests the suite
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

from benchmarks.shared.machine import (
    RESULTS,
    ROOT,
    cores,
    machine,
    module_environment,
    versions,
)

from .rivals import BITSANDBYTES_PATH
from .sections import SECTIONS, UNUSABLE, failure, run_sections, save
from .timing import Bench

_NO_FIGURES = (
    "smoke run on the CPU at tiny sizes: no figure in this file is a measurement of anything"
)
#: The files with tests marked `gpu`. Others import packages that a machine with a GPU may lack.
#: Warnings of the machine's libraries are not failures.
_TEST_FILES = (
    "test_gpu.py",
    "test_gpu_sketching.py",
    "kernels/test_triton.py",
    "kernels/test_triton_tenants.py",
    "kernels/test_triton_experts.py",
    "kernels/test_columns.py",
)
_TEST_COMMAND = [
    *(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-rfE", "--tb=short"),
    *(str(ROOT / "tests" / name) for name in _TEST_FILES),
]
_TESTS_SHARE = 0.5  # of the budget, at most
_LEAST_SECONDS = 20  # for starting another process
_MOST_SHARDS = 8  # processes of the tests
_GRACE_SECONDS = 20  # for a task that began in time


def main() -> int:
    options = _options()
    output: Path = options.output
    if options.child:
        return _child(options)
    if not options.smoke and not _has_gpu():
        print("no CUDA device: nothing was tested or measured", file=sys.stderr)
        return 1
    if options.bitsandbytes:
        os.environ[BITSANDBYTES_PATH] = str(options.bitsandbytes.resolve())
    deadline = time.monotonic() + options.seconds
    document: dict[str, Any] = {
        "benchmark": "gpu",
        "figures": _NO_FIGURES if options.smoke else "measured",
        "smoke": options.smoke,
        "machine": machine(),
        "versions": versions("torch", "triton", "transformers", "numba", "numpy"),
        "tests": _run_tests(options),
        "device": {},
        "bars": [],
        "sections": {},
    }
    save(document, output)
    document = _run_children(options, deadline)
    document["seconds"] = round(options.seconds - (deadline - time.monotonic()), 1)
    save(document, output)
    _print_bars(document)
    print(f"written to {output}")
    return 1 if _has_failed(document) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu.json")
    parser.add_argument(
        "--seconds",
        type=float,
        default=500,
        help="budget for tests and measurements (default: %(default)s)",
    )
    parser.add_argument(
        "--sections", default=",".join(SECTIONS), help="sections to measure (default: %(default)s)"
    )
    parser.add_argument("--no-tests", action="store_true", help="only measure")
    parser.add_argument("--bitsandbytes", type=Path, help="folder with the package bitsandbytes")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="test the suite on the CPU with tiny layers; figures are not valid",
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sections = options.sections.split(",")
    if unknown := [name for name in options.sections if name not in SECTIONS]:
        parser.error(f"--sections must be of {','.join(SECTIONS)}; found {','.join(unknown)}")
    if options.output is None:
        smoke = Path(tempfile.gettempdir()) / "gpu-smoke.json"
        options.output = smoke if options.smoke else RESULTS / "gpu.json"
    return options


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _run_tests(options: argparse.Namespace) -> dict[str, Any]:
    """Run the tests marked `gpu`, unless left out; stop them if they take too long."""
    if options.smoke or options.no_tests:
        return {"status": "not run"}
    begin = time.monotonic()
    shards = max(1, min(_MOST_SHARDS, cores() // 2))  # most of the time goes into compiling
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(shards)]
        processes = [
            subprocess.Popen(
                _TEST_COMMAND,
                env=os.environ | {"SPALLM_TEST_SHARD": f"{number}/{shards}"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for number, log in enumerate(logs)
        ]
        try:
            end = begin + _TESTS_SHARE * options.seconds
            codes = [process.wait(max(0, end - time.monotonic())) for process in processes]
            failed = sorted({code for code in codes if code})
            status = f"failed: pytest ended with codes {failed}" if failed else "passed"
        except subprocess.TimeoutExpired:
            status = "failed: out of time"
        finally:
            for process in processes:
                process.kill()
                process.wait()
        lines = [line for log in logs for line in _printed(log)]
    print("\n".join(lines), flush=True)
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    seconds = round(time.monotonic() - begin, 1)
    return {"status": status, "seconds": seconds, "failures": failures}


def _printed(log: TextIO) -> list[str]:
    log.seek(0)
    return log.read().splitlines()


def _run_children(options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Start processes until every section has a record; return the document."""
    while True:
        document = json.loads(options.output.read_text())
        pending = [name for name in options.sections if name not in document["sections"]]
        left = deadline - time.monotonic()
        if not pending or left < _LEAST_SECONDS:
            break
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--child",
            "--sections",
            ",".join(pending),
        ]
        command += ["--output", str(options.output), "--seconds", str(left)]
        command += ["--smoke"] if options.smoke else []
        try:
            code = subprocess.run(
                command, env=module_environment(), check=False, timeout=left + _GRACE_SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        _close(options.output, pending, code)
    for name in pending:
        document["sections"][name] = {"status": "not run: out of time", "rows": [], "errors": []}
    return document


def _child(options: argparse.Namespace) -> int:
    deadline = time.monotonic() + options.seconds
    bench = Bench.smoke() if options.smoke else Bench.on_gpu()
    document = json.loads(options.output.read_text())
    usable = run_sections(options.sections, bench, document, options.output, deadline)
    return 0 if usable else UNUSABLE


def _close(output: Path, pending: list[str], code: int | None) -> None:
    """Record what a process was doing if it ended before its work did."""
    document = json.loads(output.read_text())
    sections = document["sections"]
    how = "was stopped: out of time" if code is None else f"ended with code {code}"
    if code != 0 and pending[0] not in sections:  # or the next process would end the same way
        sections[pending[0]] = {"status": "running", "rows": [], "errors": []}
    for record in sections.values():
        if record["status"] == "running":
            record["status"] = "failed"
            task = record.pop("running", "preparing")
            record["errors"].append(failure(task, f"the process {how}"))
    save(document, output)


def _has_failed(document: dict[str, Any]) -> bool:
    sections = document["sections"].values()
    failed = any(section["status"] == "failed" for section in sections)
    return failed or document["tests"]["status"].startswith("failed")


def _print_bars(document: dict[str, Any]) -> None:
    print()
    for bar in document["bars"]:
        figure = "-" if bar["figure"] is None else f"{bar['figure']:.4g}"
        met = {True: "met", False: "NOT MET", None: "not known"}[bar["met"]]
        print(f"{bar['bar']:60} {bar['limit']:>8} {figure:>9}  {met}")
    print(f"tests: {document['tests']['status']}; {document['figures']}")


if __name__ == "__main__":
    sys.exit(main())
