"""Do one run of the fine-tuning benchmark in a separate process, so that its peak memory is known.

`benchmarks.finetune` starts it:

    python -m benchmarks.finetune.one_run JOB.json RESULT.json

All methods compute products in bfloat16 under autocast. A run without a learning rate only
evaluates the model before training.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.dense import read_linears
from benchmarks.shared.machine import quantiles, resident, write_results
from spallm_convert.cli.terminal import quiet_libraries

from .data import Batch, Data, evaluate, load_data, random_data
from .methods import METHODS, Method, adapter_parameters, load, parameter_groups

_FORGET_PEAK = Path("/proc/self/clear_refs")
_SECONDS_BETWEEN_LINES = 30
_TIMED_RATE = 1e-6  # of runs for speed alone: what they learn does not matter


@dataclass(frozen=True, kw_only=True)
class Job:
    """Describe a run: train and evaluate one method, or time several in turn.

    data: a folder, None for random tokens. sketches: folders of sketched models by method.
    """

    methods: tuple[str, ...]
    learning_rate: float | None
    dense: str
    sketches: dict[str, str]
    data: str | None
    tokens: int
    steps: int
    batch_size: int
    held_out: int
    max_length: int
    seed: int
    device: str
    in_turn: bool = False

    def source(self, name: str) -> Path:
        return Path(self.sketches.get(name, self.dense))


class Training:
    """Train a model one step at a time: AdamW, no decay, clipped at 1, linear rate."""

    def __init__(self, model: Any, learning_rate: float, steps: int) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            parameter_groups(model, learning_rate), weight_decay=0.0, fused=True
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: rate_factor(step, steps)
        )
        model.train()

    def step(self, batch: Batch) -> tuple[float, float]:
        """Do a step; return the loss before it, and its seconds."""
        begin = time.perf_counter()
        moved = {name: tensor.to(self.device) for name, tensor in batch.items()}
        with autocast(self.device):
            loss = self.model(**moved, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        value = float(loss.detach())  # waits for the device
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return value, time.perf_counter() - begin

    def optimizer_bytes(self) -> int:
        states = self._optimizer.state.values()
        return sum(t.nbytes for state in states for t in state.values() if t.dim())


class Memory:
    """Measure bytes of this process, or of GPU tensors: loaded and idle, and the later peak."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        gc.collect()
        self.loading_peak = self._peak()
        if self._cuda:
            torch.cuda.empty_cache()
            self.idle = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            self.idle = resident("VmRSS")
            if _FORGET_PEAK.exists():
                _FORGET_PEAK.write_text("5")

    def figures(self) -> dict[str, int]:
        peak = self._peak()
        return {
            "loading_peak_bytes": self.loading_peak,
            "idle_bytes": self.idle,
            "peak_bytes": peak,
            "rise_bytes": peak - self.idle,
        }

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self._cuda else resident("VmHWM")


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


def rate_factor(step: int, steps: int) -> float:
    """Return the factor of the learning rate in a step: up for a tenth, then down, never zero."""
    warm_up = max(1, steps // 10)
    return max(0.0, min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1)))


def train(job: Job) -> dict[str, Any]:
    """Train one method and evaluate it; without a learning rate, only evaluate it."""
    (name,) = job.methods
    method = METHODS[name]
    data = _data(job)
    model, about = _loaded(job, name, method)
    row = about | {"learning_rate": job.learning_rate}
    device = next(model.parameters()).device
    if job.learning_rate is not None:
        memory = Memory(device)
        training = Training(model, job.learning_rate, job.steps)
        losses, seconds = _steps(training, data.batches, f"{name} {job.learning_rate:g}")
        row |= {
            "train_loss": [_finite(loss) for loss in losses],
            "diverged": not all(map(math.isfinite, losses)),
            "memory": memory.figures() | {"optimizer_bytes": training.optimizer_bytes()},
            **_speed(data.batches[: len(losses)], seconds),
        }
    if data.questions and not row.get("diverged"):
        begin = time.perf_counter()
        found = evaluate(model, data, job.batch_size, autocast(device))
        row["held_out"] = {key: _finite(value) for key, value in found.items()}
        row["held_out_seconds"] = time.perf_counter() - begin
    return row | {"threads": torch.get_num_threads()}


def time_in_turn(job: Job) -> dict[str, Any]:
    """Return the seconds per step of several methods, which take turns on the same batches.

    The first round is dropped. `relative` is the tokens per second divided by those of the first
    method, round by round.
    """
    data = _data(job)
    models = {name: _loaded(job, name, METHODS[name])[0] for name in job.methods}
    trainings = {name: Training(model, _TIMED_RATE, job.steps) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number, batch in enumerate(data.batches):
        for name, training in trainings.items():
            seconds[name].append(training.step(batch)[1])
        _say(f"round {number + 1} of {job.steps}")
    reference = seconds[job.methods[0]]
    return {
        "reference": job.methods[0],
        "threads": torch.get_num_threads(),
        "methods": {
            name: _speed(data.batches, taken)
            | {
                "relative": quantiles(
                    [a / b for a, b in zip(reference[1:], taken[1:], strict=True)]
                )
            }
            for name, taken in seconds.items()
        },
    }


def _loaded(job: Job, name: str, method: Method) -> tuple[Any, dict[str, Any]]:
    """Load the model of a method; return it with what a row says about it."""
    torch.manual_seed(job.seed)
    linears = read_linears(Path(job.dense))
    rank = method.rank_for(linears) if method.kind.endswith("lora") else 0
    model = load(method, rank, job.source(name), job.device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    about: dict[str, Any] = {"method": name, "kind": method.kind}
    if rank:
        expected = adapter_parameters(linears, rank)
        if trained != expected:
            raise RuntimeError(f"{name} trains {trained} parameters, {expected} were expected")
        about["rank"] = rank
    return model, about | {"trainable_parameters": trained, "model_bytes": _nbytes(model)}


def _data(job: Job) -> Data:
    if job.data is None:
        vocabulary = json.loads((Path(job.dense) / "config.json").read_text())["vocab_size"]
        return random_data(
            vocabulary,
            steps=job.steps,
            batch_size=job.batch_size,
            tokens=job.tokens,
            seed=job.seed,
        )
    from transformers import AutoTokenizer

    return load_data(
        Path(job.data),
        AutoTokenizer.from_pretrained(job.dense),
        steps=job.steps,
        batch_size=job.batch_size,
        held_out=job.held_out,
        max_length=job.max_length,
        seed=job.seed,
    )


def _steps(
    training: Training, batches: Sequence[Batch], title: str
) -> tuple[list[float], list[float]]:
    """Return losses and seconds of all steps, up to the first loss that is not finite."""
    losses: list[float] = []
    seconds: list[float] = []
    said = time.perf_counter()
    for number, batch in enumerate(batches, start=1):
        loss, took = training.step(batch)
        losses.append(loss)
        seconds.append(took)
        if not math.isfinite(loss):
            _say(f"{title}: diverged in step {number}")
            break
        if number == len(batches) or time.perf_counter() - said > _SECONDS_BETWEEN_LINES:
            said = time.perf_counter()
            mean = sum(seconds) / number
            _say(
                f"{title}: step {number} of {len(batches)}, loss {loss:.4f}, {mean:.2f} s a step, "
                f"{mean * (len(batches) - number):.0f} s left"
            )
    return losses, seconds


def _speed(batches: Sequence[Batch], seconds: Sequence[float]) -> dict[str, Any]:
    """Return seconds and tokens per second after the first step; padding is not counted."""
    pairs = list(zip(batches, seconds, strict=True))[1:]
    if not pairs:
        return {}
    rates = [int(batch["attention_mask"].sum()) / took for batch, took in pairs]
    return {
        "seconds_per_step": quantiles([took for _, took in pairs]),
        "tokens_per_second": quantiles(rates),
    }


def _nbytes(model: Any) -> int:
    """Return the bytes that a saved model would have: tied tensors once, NF4's scales included."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(tensors.values())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _say(line: str) -> None:
    print(f"    {line}", flush=True)


def main() -> None:
    quiet_libraries()
    job_path, result = map(Path, sys.argv[1:])
    described = json.loads(job_path.read_text())
    job = Job(**described | {"methods": tuple(described["methods"])})
    write_results(result, time_in_turn(job) if job.in_turn else train(job))


if __name__ == "__main__":
    main()
