"""Time one sketched layer against torch's dense layer, for one token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spallm_kernels.linear import dequantize, lut_linear

FEATURES, BITS, GROUPS = 4096, 4, 4
#: The most calls that a median is taken of, and the seconds after which no further one starts.
_CALLS, _SECONDS = 15, 0.8
#: Calls on a GPU between two waits for it: a wait takes longer than a call.
_CALLS_AT_ONCE = 20


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Hold the milliseconds of a layer of FEATURES x FEATURES for one token on a device."""

    device: str
    sketched_ms: float
    dense_float32_ms: float
    dense_bfloat16_ms: float


def random_layer(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a random index map and tables in bfloat16."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    shape = (FEATURES, FEATURES * BITS // 8)
    index_map = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    table = torch.randn(FEATURES, GROUPS, 1 << BITS, generator=generator) * FEATURES**-0.5
    return index_map.to(device), table.to(device, torch.bfloat16)


@torch.no_grad()
def measure(device: torch.device) -> Throughput:
    """Time one token through the layer, sketched and dense.

    The figures are rough: a GPU keeps a layer of this size in its cache from call to call.
    """
    index_map, table = random_layer(device)
    dense = dequantize(index_map, table, FEATURES)
    wide = dense.float()
    x = torch.ones(1, FEATURES, dtype=torch.bfloat16, device=device)
    wide_x, linear = x.float(), torch.nn.functional.linear
    return Throughput(
        device=str(device),
        sketched_ms=_median_ms(lambda: lut_linear(x, index_map, table), device),
        dense_float32_ms=_median_ms(lambda: linear(wide_x, wide), device),
        dense_bfloat16_ms=_median_ms(lambda: linear(x, dense), device),
    )


def _median_ms(call: Callable[[], Tensor], device: torch.device) -> float:
    at_once = 1 if device.type == "cpu" else _CALLS_AT_ONCE
    call()  # compiles
    _wait(device)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < _CALLS and (not times or time.perf_counter() < start + _SECONDS):
        before = time.perf_counter()
        for _ in range(at_once):
            call()
        _wait(device)
        times.append((time.perf_counter() - before) / at_once)
    return 1e3 * statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
