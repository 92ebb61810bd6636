"""Time contestants in turn, on operands that no cache holds: how the GPU suite measures.

A contestant is a list of calls that do the same work on different copies of its operands. There are
so many copies that the second-level cache has lost the first one when it is used again. All calls
of a contestant are one CUDA graph, or one Python loop if the cost of launching belongs to the
figure. A sample is the time between two events around enough runs of it to last a while. Before the
first event a large buffer is overwritten, which also keeps the device busy until the runs are
queued. Contestants take their samples in turn, so clocks and temperature are the same for all.

The smoke bench does the same on the CPU with tiny layers and the host's clock. Its figures mean
nothing, but its paths through the code are the same.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared.machine import quantiles

Call = Callable[[], Any]

_WARM_SAMPLES = 4  # dropped: clocks rise, and copies made a moment ago leave the cache
_MOST_RUNS = 100  # of a contestant in one sample
_MOST_COPIES = 128
_COLD_BYTES = 256 << 20
_ALLOCATION = 512  # bytes that torch's allocator rounds up to


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Hold a device, and how much is measured on it.

    `samples` of each contestant are kept, each at least `sample_seconds` long. The copies of an
    operand hold at least `rotated_bytes` together. Sizes of layers are divided by `scale`, and
    tokens are at most `most_tokens`.
    """

    device: torch.device
    samples: int
    sample_seconds: float
    rotated_bytes: int
    scale: int = 1
    most_tokens: int = 1 << 20

    @classmethod
    def on_gpu(cls) -> Bench:
        """Return a bench with copies of ten times an H100's second-level cache, samples of 1 ms."""
        return cls(
            device=torch.device("cuda", 0),
            samples=25,
            sample_seconds=1e-3,
            rotated_bytes=512 << 20,
        )

    @classmethod
    def smoke(cls) -> Bench:
        return cls(
            device=torch.device("cpu"),
            samples=2,
            sample_seconds=0.0,
            rotated_bytes=0,
            scale=128,
            most_tokens=5,
        )

    @property
    def has_gpu(self) -> bool:
        return self.device.type == "cuda"

    def size(self, features: int) -> int:
        return features // self.scale

    def tokens(self, count: int) -> int:
        return min(count, self.most_tokens)

    def copies(self, nbytes: int) -> int:
        """Return how many operands of a size are rotated."""
        return min(_MOST_COPIES, max(2, 1 + self.rotated_bytes // nbytes))

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)

    def compare(
        self, contestants: Mapping[str, Sequence[Call]], *, graph: bool = True
    ) -> dict[str, dict[str, float]]:
        """Return microseconds per call of each contestant: p20, p50 and p80, sampled in turn."""
        runs = {name: self._runner(calls, graph) for name, calls in contestants.items()}
        counts = {name: self._calibrate(run) for name, run in runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(_WARM_SAMPLES + self.samples):
            for name, run in runs.items():
                seconds[name].append(self.seconds(run, counts[name], queued=graph))
        return {
            name: quantiles(
                [1e6 * s / counts[name] / len(contestants[name]) for s in taken[_WARM_SAMPLES:]]
            )
            for name, taken in seconds.items()
        }

    def seconds(self, run: Call, times: int = 1, *, queued: bool = True) -> float:
        """Return how long some runs take on the device, from the first to the end of the last.

        `queued` runs follow work that is still running, so that launching the first costs nothing.
        Others begin on an idle device.
        """
        if not self.has_gpu:
            begin = time.perf_counter()
            for _ in range(times):
                run()
            return time.perf_counter() - begin
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if queued:
            self._cold.zero_()
        start.record()
        for _ in range(times):
            run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    def capture(self, calls: Sequence[Call]) -> Call:
        """Capture some calls in one CUDA graph and return a call that replays it.

        On the CPU it is a plain loop.

        They run once before, on a separate stream, because capturing allows no compilation and no
        first use of a library.
        """
        if not self.has_gpu:
            return functools.partial(_run_all, calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            _run_all(calls)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _run_all(calls)
        return graph.replay

    def extra_memory(self) -> MemoryMeter:
        """Count what is allocated from here on."""
        return MemoryMeter(self.has_gpu)

    def collect(self) -> None:
        """Free memory that is no longer used, that of graphs included."""
        if self.has_gpu:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def is_usable(self) -> bool:
        """Return whether the device still answers; after an illegal access it never does."""
        try:
            return bool((torch.ones(8, device=self.device) + 1).sum().item() == 16)
        except Exception:
            return False

    @functools.cached_property
    def _cold(self) -> Tensor:
        """Return a buffer that takes 0.1 ms to overwrite and leaves nothing else in the cache."""
        return torch.empty(_COLD_BYTES, dtype=torch.uint8, device=self.device)

    def _runner(self, calls: Sequence[Call], graph: bool) -> Call:
        run = self.capture(calls) if graph else functools.partial(_run_all, calls)
        run()
        return run

    def _calibrate(self, run: Call) -> int:
        once = max(self.seconds(run), 1e-6)
        return max(1, min(_MOST_RUNS, math.ceil(self.sample_seconds / once)))


class MemoryMeter:
    """Count bytes that torch has allocated on the GPU since it was made; None without a GPU."""

    def __init__(self, has_gpu: bool) -> None:
        self._has_gpu = has_gpu
        self._before = 0
        if has_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def now(self, *outputs: Tensor) -> int | None:
        """Return what is allocated besides some outputs."""
        return self._beyond(torch.cuda.memory_allocated, outputs)

    def peak(self, *outputs: Tensor) -> int | None:
        """Return the most that has been allocated, minus some outputs."""
        return self._beyond(torch.cuda.max_memory_allocated, outputs)

    def _beyond(self, read: Callable[[], int], outputs: Sequence[Tensor]) -> int | None:
        if not self._has_gpu:
            return None
        torch.cuda.synchronize()
        return read() - self._before - sum(_allocated(output) for output in outputs)


def _allocated(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALLOCATION) * _ALLOCATION


def _run_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
