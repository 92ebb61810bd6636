"""Start the server of cases and collect its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cases import Case

_TESTS = Path(__file__).parents[1]
_ONE_THREAD = {
    # Children are forked: numba's own pool of threads survives that, OpenMP's does not.
    "NUMBA_THREADING_LAYER": "workqueue",
    "NUMBA_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "PYTHONHASHSEED": "0",
}


@dataclass(frozen=True)
class Result:
    """Say how a case ended.

    Attributes:
        case: The case.
        outcome: "accepted", "excused", "refused", "hung", "died" or "not run".
        broken: Pairs of a rule and what happened.
        seconds: How long it computed.
    """

    case: Case
    outcome: str
    broken: tuple[tuple[str, str], ...]
    seconds: float


def run_cases(cases: Sequence[Case]) -> list[Result]:
    """Run cases in forked children.

    Args:
        cases: The cases.

    Returns:
        A result for each case.

    Raises:
        RuntimeError: If the server itself fails.
    """
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory(prefix="spallm-fuzz-") as root:
        log = Path(root) / "server.log"
        environment = os.environ | _ONE_THREAD | {"HF_HOME": f"{root}/hf"}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, [_TESTS, *sys.path]))
        with log.open("w") as output:
            server = subprocess.Popen(
                [sys.executable, "-m", "fuzz.server", root, str(writing)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[writing],
                env=environment,
                text=True,
            )
        os.close(writing)
        assert server.stdin is not None
        server.stdin.write("".join(f"{case}\n" for case in cases))
        server.stdin.close()
        with os.fdopen(reading) as lines:
            results = [_result(line) for line in lines]
        if server.wait() or len(results) != len(cases):
            raise RuntimeError(f"the server failed: {log.read_text()[-3000:]}")
    return results


def _result(line: str) -> Result:
    document = json.loads(line)
    broken = tuple((rule, what) for rule, what in document["broken"])
    return Result(Case.parse(document["case"]), document["outcome"], broken, document["seconds"])
