"""Compare calibrated sketching of a layer in torch on the device with numba on the machine's cores.

Both get the same weights and the same Hessian, of correlated inputs of different size per column,
and both cluster on the CPU. Preparing the Hessian is timed separately from sketching, because
layers with the same inputs share it. Each runs once, after a run on a few rows that compiles.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared.machine import cores
from spallm_convert.calibration.backends import Numerics, OnCpu
from spallm_convert.calibration.layers import DAMPING
from spallm_convert.devices import full_float32
from spallm_kernels import batched

from .operands import BITS, GROUPS, Layer, Task
from .timing import Bench

#: Four million weights each, which take numba seconds on a few cores.
LAYERS = (Layer(2048, 2048), Layer(1024, 4096))
_FEW = 8


def conversion(bench: Bench) -> list[Task]:
    return [Task(layer.name, partial(measure_sketching, bench, layer)) for layer in LAYERS]


@torch.no_grad()
def measure_sketching(bench: Bench, layer: Layer) -> dict[str, Any]:
    """Measure seconds of both, step by step, and the final loss by the damped Hessian."""
    torch.manual_seed(0)
    rows, columns = bench.size(layer.out_features), bench.size(layer.in_features)
    with full_float32():
        weights = bench.randn(rows, columns, dtype=torch.float32)
        hessian = _hessian(bench, columns)
        seconds, losses = {}, {}
        # numba runs on copies on the CPU; smoke runs use the device's code on the CPU too.
        contestants: dict[str, tuple[Any, Tensor, Tensor]] = {
            "device": (batched, weights, hessian),
            "numba": (OnCpu(), weights.cpu(), hessian.cpu()),
        }
        for name, (numerics, *operands) in contestants.items():
            _sketch(bench, numerics, operands[0][:_FEW], operands[1])
            seconds[name], losses[name] = _sketch(bench, numerics, *operands)
    return {
        "layer": layer.name,
        "bits": BITS,
        "groups": GROUPS,
        "cores": cores(),
        "seconds": seconds,
        "speedup": sum(seconds["numba"].values()) / sum(seconds["device"].values()),
        "loss": losses,
    }


def _hessian(bench: Bench, columns: int) -> Tensor:
    x = bench.randn(2 * columns, columns, dtype=torch.float32)
    common = bench.randn(2 * columns, 4, dtype=torch.float32)
    x += common @ bench.randn(4, columns, dtype=torch.float32)
    x *= bench.randn(columns, dtype=torch.float32).exp()
    return (x.T @ x).double()


def _sketch(
    bench: Bench, numerics: Numerics, weights: Tensor, hessian: Tensor
) -> tuple[dict[str, float], float]:
    """Return the seconds of both steps, and the final loss."""
    begin = _now(bench)
    prepared = numerics.prepare_hessian(hessian, DAMPING)
    middle = _now(bench)
    fitted = numerics.fit(weights, prepared, GROUPS, 1 << BITS)
    end = _now(bench)
    return {"prepare": middle - begin, "fit": end - middle}, fitted.losses[-1][1]


def _now(bench: Bench) -> float:
    if bench.has_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()
