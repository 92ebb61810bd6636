"""Run cases in forked children: `python -m fuzz.server FOLDER RESULTS_FD` reads names of cases.

The server imports torch and transformers and compiles what is needed once. Cases then run in forks
of it, with a limit on memory and a limit on time that the server enforces from outside. One line of
JSON per case goes to the file descriptor RESULTS_FD. A fork takes as long as a case, so each runs a
few cases. It ends after the first that breaks a rule, and the rest run in the next.

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
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Seconds that a case may compute, and seconds that it may take, for example by waiting.
LIMIT = float(os.environ.get("SPALLM_FUZZ_LIMIT", "10"))
WAITING_LIMIT = 3 * LIMIT
#: Memory that a case may take: twice its files and this.
MEMORY = 256 << 20
#: A limit of the system above that, so that a case that takes more fails instead of the machine.
_DATA = 1 << 30
_FILE = 1 << 28
#: After this many hangs the rest of a kind is not run: each takes long.
_HANGS = 2
#: Cases of a child. A case with more bytes of files than `_MANY` is the last of its child.
_BATCH, _MANY = 8, 8 << 20
#: Sound folders of every family that are checked before the first fork.
_SOUND = 8


@dataclass
class _Running:
    """A child, its cases that are not reported yet, and when the first of them began."""

    pid: int
    cases: list[Any]
    trace: Path
    started: float = field(default_factory=time.monotonic)
    computed: float = 0.0
    answer: bytes = b""


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

    began = time.process_time()
    folder, spoiled = prepare(root, case, bases)
    rng = case.random()
    _limit_files(resource.RLIM_INFINITY)
    case.mutation(spoiled, rng)
    if case.family == "checkpoint" and rng.random() < 0.5:
        refresh_hashes(spoiled)
    _limit_files(_FILE)
    size = _size(folder)
    writable = spoiled.parent if case.family == "work" else folder / "out"
    before = snapshot(folder, writable)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of earlier cases
    at_start = _memory()
    findings = CHECKS[case.family](spoiled, rng, bases)
    now = _memory()
    grown = now["VmHWM"] - at_start["VmRSS"] - max(0, now["RssFile"] - at_start["RssFile"])
    if grown > MEMORY + 2 * size:
        findings.add("memory", f"{grown >> 20} MiB for {size >> 10} KiB of files")
    if changed := differences(before, snapshot(folder, writable)):
        findings.add("files outside are changed", ascii(changed[:4]))
    return {
        "case": str(case),
        "outcome": findings.outcome,
        "broken": findings.broken,
        "seconds": time.process_time() - began,
        "last": bool(findings.broken) or size > _MANY,
    }


def warm_up(root: Path, families: list[str], bases: Any) -> None:
    """Check sound folders in this process, so that no child has to import modules or load kernels.

    Importing rich alone takes 100 ms, three times as long as an average case.

    Raises:
        RuntimeError: If a sound folder breaks a rule, or all of a family are refused.
    """
    from .cases import Case
    from .faults import FAMILY
    from .invariants import CHECKS

    for family in families:
        if family == FAMILY:
            continue
        outcomes = set()
        for seed in range(_SOUND):
            case = Case(family, "sound", seed)
            folder, sound = prepare(root, case, bases)
            findings = CHECKS[family](sound, case.random(), bases)
            shutil.rmtree(folder)
            outcomes.add(findings.outcome)
            if findings.broken:
                raise RuntimeError(f"{case}: {findings.broken}")
        if "accepted" not in outcomes:  # without `resume`, an unfinished conversion is refused
            raise RuntimeError(f"{family}: sound folders are {outcomes}")


def _limit_files(size: int) -> None:
    """Limit the size of files that are written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _size(folder: Path) -> int:
    """Return the bytes on the disk below a folder."""
    return sum(p.lstat().st_blocks * 512 for p in folder.rglob("*") if not p.is_symlink())


def _memory() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split() for line in lines if line.startswith(("Vm", "Rss")))
    return {pair[0].rstrip(":"): int(pair[1]) << 10 for pair in pairs}


def _child(root: Path, cases: list[Any], bases: Any, answer: int) -> None:
    """Run cases in a child and end it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    trace = _trace(root, os.getpid()).open("w")
    faulthandler.enable(trace)
    faulthandler.register(signal.SIGUSR1, trace, all_threads=False)
    data = _memory()["VmData"] + _DATA
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with os.fdopen(answer, "wb", buffering=0) as pipe:
        for case in cases:
            try:
                result = run_case(root, case, bases)
            except BaseException as error:
                text = "".join(traceback.format_exception(error)[-3:])
                broken = [("the case itself fails", text[-600:])]
                result = {"case": str(case), "outcome": "?", "broken": broken}
                result |= {"seconds": 0.0, "last": True}
            pipe.write(json.dumps(result).encode() + b"\n")
            if result["last"]:
                break
    os._exit(0)


class Server:
    """Fork children, at most `workers` at a time, and report each of their cases."""

    def __init__(self, root: Path, bases: Any, results: int, workers: int) -> None:
        self.root, self.bases, self.workers = root, bases, workers
        self._results = os.fdopen(results, "w", buffering=1)
        self._selector = selectors.DefaultSelector()
        self._waiting: list[Any] = []
        self._hangs: dict[tuple[str, str], int] = {}

    def run(self, cases: list[Any]) -> None:
        """Run all cases."""
        self._waiting = cases[::-1]
        while self._waiting or self._selector.get_map():
            while self._waiting and len(self._selector.get_map()) < self.workers:
                self._start()
            for key, _ in self._selector.select(timeout=0.5):
                piece = os.read(key.fd, 1 << 16)
                self._take(key.data, piece)
                if not piece:
                    self._end(key.fd, key.data)
            for key in list(self._selector.get_map().values()):
                if self._is_late(key.data):
                    self._kill(key.fd, key.data)

    def _start(self) -> None:
        batch = []
        while self._waiting and len(batch) < _BATCH:
            case = self._waiting.pop()
            if self._hangs.get((case.family, case.kind), 0) < _HANGS:
                batch.append(case)
            else:
                self._report(case, "not run", [])
        if not batch:
            return
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reading)
            _child(self.root, batch, self.bases, writing)
        os.close(writing)
        running = _Running(pid, batch, _trace(self.root, pid))
        self._selector.register(reading, selectors.EVENT_READ, running)

    def _take(self, running: _Running, piece: bytes) -> None:
        """Report the cases whose results have arrived."""
        *lines, running.answer = (running.answer + piece).split(b"\n")
        for line in lines:
            result = json.loads(line)
            case = running.cases.pop(0)
            self._report(case, result["outcome"], result["broken"], result["seconds"])
            running.started, running.computed = time.monotonic(), _computed(running.pid)

    def _is_late(self, running: _Running) -> bool:
        """Return whether a case is over a limit. Other processes may keep it from computing."""
        waited = time.monotonic() - running.started
        return waited > WAITING_LIMIT or (
            waited > LIMIT and _computed(running.pid) - running.computed > LIMIT
        )

    def _kill(self, fd: int, running: _Running) -> None:
        os.kill(running.pid, signal.SIGUSR1)
        time.sleep(0.2)  # the child writes where it is
        os.kill(running.pid, signal.SIGKILL)
        self._end(fd, running, hung=True)

    def _end(self, fd: int, running: _Running, *, hung: bool = False) -> None:
        """Report the case in which a child ended, and put the cases after it back."""
        self._selector.unregister(fd)
        os.close(fd)
        _, status = os.waitpid(running.pid, 0)
        if status and running.cases:
            case = running.cases.pop(0)
            where = _innermost(running.trace)
            if hung:
                kind = (case.family, case.kind)
                self._hangs[kind] = self._hangs.get(kind, 0) + 1
                self._report(case, "hung", [("hangs", where)], LIMIT)
            else:
                code = os.waitstatus_to_exitcode(status)
                self._report(case, "died", [("dies", f"exit code {code}: {where}")])
        running.trace.unlink(missing_ok=True)
        self._waiting += running.cases[::-1]

    def _report(self, case: Any, outcome: str, broken: list[Any], seconds: float = 0.0) -> None:
        shutil.rmtree(self.root / "cases" / case.digest, ignore_errors=True)
        result = {"case": str(case), "outcome": outcome, "broken": broken, "seconds": seconds}
        self._results.write(json.dumps(result) + "\n")


def _trace(root: Path, pid: int) -> Path:
    return root / f"{pid}.trace"


def _computed(pid: int) -> float:
    """Return the seconds of computing of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
    from .bases import make_bases, shorten_text

    cases = [catalogue.Case.parse(line.strip()) for line in sys.stdin if line.strip()]
    families = {case.family for case in cases}
    shorten_text()
    bases = make_bases(root, families)
    os.fsync = lambda fd: None  # no case is about the disk, and it is slow
    (root / "cases").mkdir()
    warm_up(root, sorted(families), bases)
    gc.collect()
    gc.disable()  # a collection in a child would copy the pages of all objects
    Server(root, bases, results, workers=os.cpu_count() or 1).run(cases)


if __name__ == "__main__":
    main()
