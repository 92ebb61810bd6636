"""Time alternative tiles of the Triton kernels against the defaults, to find better defaults.

For each kernel, width and number of tokens, the script goes through the fields of a tile and
changes one at a time. It keeps a change that is faster over all layers together (the geometric
mean), until a round changes nothing. A tile that does not compile, or gives another result, is
listed with the reason. Better tiles belong in `kernels/spallm_kernels/triton/tiles.py`.

    python -m benchmarks.gpu.tune --seconds 300 --output FILE
    python -m benchmarks.gpu.tune --kernels decode --bits 4 --tokens 1,16
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.shared.machine import RESULTS, machine, versions, write_results

from .operands import ratio
from .sections import describe
from .timing import Bench

if TYPE_CHECKING:
    from .tiles import Choice, Search, Trial

_KERNELS = ("decode", "dequantize", "table_grad")
_TOLERANCE = 1e-2  # relative difference of a result from the default tile's
_GAIN = 1.01  # times faster that a change must be: less is noise


def main() -> int:
    options = _options()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was tuned", file=sys.stderr)
        return 1
    from .tiles import searches

    bench = replace(Bench.on_gpu(), samples=10)
    deadline = time.monotonic() + options.seconds
    results: list[dict[str, Any]] = []
    document = {
        "benchmark": "tune",
        "machine": machine(),
        "versions": versions("torch", "triton"),
        "device": describe(bench),
        "results": results,
    }
    for name, prepare in searches(options.kernels, options.bits, options.tokens):
        if time.monotonic() > deadline:
            print(f"{name}: not searched, out of time")
            continue
        found = search(bench, prepare(bench), deadline)
        results.append({"search": name} | found)
        write_results(options.output, document)
        print(f"{name}: {found['speedup']:.3f} x with {_changes(found)}", flush=True)
        bench.collect()
    print(f"written to {options.output}")
    return 0


def search(bench: Bench, about: Search, deadline: float) -> dict[str, Any]:
    """Change one field at a time; return the best choice and all that was tried."""
    best, best_speedup = about.default, 1.0
    tried: dict[str, Any] = {}
    changed = True
    while changed:
        changed = False
        for field, values in about.fields.items():
            for value in values:
                choice = best | {field: value}
                name = " ".join(f"{key}={number}" for key, number in choice.items())
                if choice == about.default or name in tried or time.monotonic() > deadline:
                    continue
                tried[name] = outcome = attempt(bench, choice, about.trials)
                speedup = outcome if isinstance(outcome, float) else 0.0
                if speedup > _GAIN * best_speedup:
                    best, best_speedup, changed = choice, speedup, True
    return {"default": about.default, "best": best, "speedup": best_speedup, "tried": tried}


def attempt(bench: Bench, choice: Choice, trials: Sequence[Trial]) -> float | str:
    """Return the speedup over the default over all layers, or why the choice cannot be used."""
    logarithms = []
    for trial in trials:
        try:
            contestants = trial(choice)
            difference = _difference(contestants["tried"][0](), contestants["default"][0]())
            if not difference < _TOLERANCE:
                return f"gives another result: relative difference {difference:.2g}"
            us = bench.compare(contestants)
        except Exception as reason:  # the compiler's and the driver's have no common class
            return f"{type(reason).__name__}: {reason}"[:200]
        logarithms.append(math.log(ratio(us, "tried", "default")))
    return math.exp(sum(logarithms) / len(logarithms))


def _difference(found: Tensor, expected: Tensor) -> float:
    found, expected = found.float(), expected.float()
    return ((found - expected).norm() / expected.norm()).item()


def _changes(found: dict[str, Any]) -> str:
    default = found["default"]
    changed = [f"{key}={value}" for key, value in found["best"].items() if value != default[key]]
    return " ".join(changed) or "the default"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "tune.json")
    parser.add_argument(
        "--seconds",
        type=float,
        default=300,
        help="no new tile is tried after this time (default: %(default)s)",
    )
    parser.add_argument("--kernels", default=",".join(_KERNELS), help="default: %(default)s")
    parser.add_argument("--bits", default="4,3,2", help="default: %(default)s")
    parser.add_argument("--tokens", default="1,16,8,64,32", help="default: %(default)s")
    options = parser.parse_args()
    options.kernels = options.kernels.split(",")
    if unknown := set(options.kernels) - set(_KERNELS):
        parser.error(f"--kernels must be of {','.join(_KERNELS)}; found {','.join(unknown)}")
    options.bits, options.tokens = (
        [int(number) for number in text.split(",")] for text in (options.bits, options.tokens)
    )
    return options


if __name__ == "__main__":
    sys.exit(main())
