"""Run cases in forked children: `python -m fuzz.server FOLDER RESULTS_FD` reads names of cases.

The server imports torch and transformers and compiles what is needed once. Each case then runs in
a fork of it, with a limit on memory and a limit on time that the server enforces from outside. One
line of JSON per case goes to the file descriptor RESULTS_FD.

It is a process of its own because a process whose OpenMP threads have run cannot fork safely, and
other tests use these threads.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import resource
import selectors
import shutil
import signal
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Seconds that a case may take.
LIMIT = 10.0
#: Memory that a case may take: twice its files and this.
MEMORY = 256 << 20
#: A limit of the system above that, so that a case that takes more fails instead of the machine.
_DATA = 1 << 30
_FILE = 1 << 28
#: After this many hangs the rest of a kind is not run: each costs LIMIT seconds.
_HANGS = 2


@dataclass
class _Running:
    case: Any
    pid: int
    folder: Path
    started: float
    answer: bytearray = field(default_factory=bytearray)


def prepare(root: Path, case: Any, bases: Any) -> tuple[Path, Path]:
    """Make the folder of a case, with a sound copy and files of the user's beside it.

    Returns:
        The folder, and what is to be spoiled.
    """
    from .invariants import PLACES
    from .mutations_files import SENTINEL

    rng = case.random()
    base = rng.choice(bases.folders[case.family])
    folder = root / "cases" / case.digest
    sentinel = folder / SENTINEL
    sentinel.mkdir(parents=True)
    (sentinel / "thesis.txt").write_text("years of work")
    (sentinel / "settings.json").write_text('{"theme": "dark"}')
    if case.family == "work":
        spoiled = folder / base.parent.name / "out"
        shutil.copytree(base, spoiled)
        return folder, spoiled / ".spallm-partial"
    spoiled = folder / PLACES[case.family]
    copy = shutil.copyfile if base.is_file() else shutil.copytree
    copy(base, spoiled)
    return folder, spoiled


def run_case(root: Path, case: Any, bases: Any) -> dict[str, Any]:
    """Spoil a copy, check what must hold, and describe what does not."""
    from .findings import differences, snapshot
    from .invariants import CHECKS, refresh_hashes

    folder, spoiled = prepare(root, case, bases)
    rng = case.random()
    case.mutation(spoiled, rng)
    if case.family == "checkpoint" and rng.random() < 0.5:
        refresh_hashes(spoiled)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE, _FILE))
    size = _size(folder)
    writable = spoiled.parent if case.family == "work" else folder / "out"
    before, at_start = snapshot(folder, writable), _memory()
    findings = CHECKS[case.family](spoiled, rng, bases)
    now = _memory()
    grown = now["VmHWM"] - at_start["VmRSS"] - max(0, now["RssFile"] - at_start["RssFile"])
    if grown > MEMORY + 2 * size:
        findings.add("memory", f"{grown >> 20} MiB for {size >> 10} KiB of files")
    if changed := differences(before, snapshot(folder, writable)):
        findings.add("files outside are changed", ascii(changed[:4]))
    return {"outcome": findings.outcome, "broken": findings.broken}


def _size(folder: Path) -> int:
    """Return the bytes on the disk below a folder."""
    return sum(p.lstat().st_blocks * 512 for p in folder.rglob("*") if not p.is_symlink())


def _memory() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split() for line in lines if line.startswith(("Vm", "Rss")))
    return {pair[0].rstrip(":"): int(pair[1]) << 10 for pair in pairs}


def _child(root: Path, case: Any, bases: Any, answer: int) -> None:
    """Run a case in a child and end it."""
    folder = root / "cases"
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    trace = (folder / f"{os.getpid()}.trace").open("w")
    faulthandler.enable(trace)
    faulthandler.register(signal.SIGUSR1, trace, all_threads=False)
    data = _memory()["VmData"] + _DATA
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        result = run_case(root, case, bases)
    except BaseException as error:
        import traceback

        lines = traceback.format_exception(error)[-3:]
        result = {"outcome": "?", "broken": [("the case itself fails", "".join(lines)[-600:])]}
    with os.fdopen(answer, "wb") as pipe:
        pipe.write(json.dumps(result).encode())
    os._exit(0)


class Server:
    """Fork children, at most `workers` at a time, and report each when it ends."""

    def __init__(self, root: Path, bases: Any, results: int, workers: int) -> None:
        self.root, self.bases, self.workers = root, bases, workers
        self._results = os.fdopen(results, "w", buffering=1)
        self._selector = selectors.DefaultSelector()
        self._hangs: dict[tuple[str, str], int] = {}
        (root / "cases").mkdir(exist_ok=True)

    def run(self, cases: list[Any]) -> None:
        """Run all cases."""
        waiting = cases[::-1]
        while waiting or self._selector.get_map():
            while waiting and len(self._selector.get_map()) < self.workers:
                case = waiting.pop()
                if self._hangs.get((case.family, case.kind), 0) >= _HANGS:
                    self._report(case, {"outcome": "not run", "broken": []}, 0.0)
                else:
                    self._start(case)
            for key, _ in self._selector.select(timeout=0.5):
                running: _Running = key.data
                piece = os.read(key.fd, 1 << 16)
                running.answer += piece
                if not piece:
                    self._end(key.fd, running)
            for key in list(self._selector.get_map().values()):
                if time.monotonic() - key.data.started > LIMIT:
                    self._kill(key.fd, key.data)

    def _start(self, case: Any) -> None:
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reading)
            _child(self.root, case, self.bases, writing)
        os.close(writing)
        running = _Running(case, pid, self.root / "cases", time.monotonic())
        self._selector.register(reading, selectors.EVENT_READ, running)

    def _end(self, fd: int, running: _Running, hung: str | None = None) -> None:
        self._selector.unregister(fd)
        os.close(fd)
        _, status = os.waitpid(running.pid, 0)
        trace = running.folder / f"{running.pid}.trace"
        if hung is not None:
            result = {"outcome": "hung", "broken": [("hangs", hung)]}
        elif status or not running.answer:
            code = os.waitstatus_to_exitcode(status)
            what = f"exit code {code}: {_innermost(trace)}"
            result = {"outcome": "died", "broken": [("dies", what)]}
        else:
            result = json.loads(running.answer)
        trace.unlink(missing_ok=True)
        self._report(running.case, result, time.monotonic() - running.started)

    def _kill(self, fd: int, running: _Running) -> None:
        os.kill(running.pid, signal.SIGUSR1)
        time.sleep(0.2)  # the child writes where it is
        os.kill(running.pid, signal.SIGKILL)
        kind = (running.case.family, running.case.kind)
        self._hangs[kind] = self._hangs.get(kind, 0) + 1
        where = _innermost(running.folder / f"{running.pid}.trace")
        self._end(fd, running, f"more than {LIMIT:g} s: {where}")

    def _report(self, case: Any, result: dict[str, Any], seconds: float) -> None:
        shutil.rmtree(self.root / "cases" / case.digest, ignore_errors=True)
        line = {"case": str(case), "seconds": round(seconds, 3)} | result
        self._results.write(json.dumps(line) + "\n")


def _innermost(trace: Path) -> str:
    """Return the innermost lines of a traceback of faulthandler that are ours."""
    lines = trace.read_text().splitlines() if trace.exists() else []
    ours = [line.strip() for line in lines if "/spallm_" in line]
    return "; ".join(line[line.index("spallm_") :] for line in ours[:2]) or " ".join(lines[:3])


def main() -> None:
    """Read cases from standard input, run them and report."""
    root, results = Path(sys.argv[1]), int(sys.argv[2])
    warnings.simplefilter("ignore")
    from . import catalogue
    from .bases import make_bases

    cases = [catalogue.Case.parse(line.strip()) for line in sys.stdin if line.strip()]
    bases = make_bases(root, {case.family for case in cases})
    os.fsync = lambda fd: None  # no case is about the disk, and it is slow
    gc.collect()
    gc.freeze()  # so that children share the memory of all objects
    Server(root, bases, results, workers=os.cpu_count() or 1).run(cases)


if __name__ == "__main__":
    main()
