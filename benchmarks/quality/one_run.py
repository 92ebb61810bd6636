"""Do one run of the quality benchmark in a separate process, so that its peak memory is known.

`benchmarks.quality` starts it:

    python -m benchmarks.quality.one_run JOB.json RESULT.json
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.machine import cpu_seconds, peak_of_any, write_results
from spallm_convert.cli.terminal import EvaluationProgress, quiet_libraries
from spallm_convert.evaluation.perplexity import evaluate_text

from . import llamacpp
from .methods import CALIBRATED, METHODS, PEERS
from .quantize import open_subject, quantize


@dataclass(frozen=True, kw_only=True)
class Job:
    """Describe a run: a method that quantizes the model in the folder `dense`, and its measurement.

    text: a file. Its first half calibrates, with `samples` samples of `seqlen` tokens. Perplexity
    is measured on the first `eval_tokens` tokens of its second half, in windows of `window` tokens.
    kept: a folder that passes files from one run to another.
    """

    method: str
    dense: str
    text: str
    samples: int
    seqlen: int
    eval_tokens: int
    window: int
    seed: int
    kept: str


def halves(text: str) -> tuple[str, str]:
    """Cut a text in two at the middle of its characters."""
    middle = len(text) // 2
    return text[:middle], text[middle:]


def measure(job: Job) -> dict[str, Any]:
    """Quantize and measure; return the row of results."""
    method = METHODS[job.method]
    shown, held_out = halves(Path(job.text).read_text(encoding="utf-8"))
    model, figures = quantized_model(job, shown)
    begin = time.perf_counter()
    loss = held_out_loss(job, model, held_out)
    return {
        "method": job.method,
        "kind": method.kind,
        "bits": method.bits,
        "groups_per_row": method.groups,
        "calibrated": method.kind in CALIBRATED,
        **figures,
        **{name: loss[name] for name in ("perplexity", "nats_per_token", "tokens")},
        "evaluation_seconds": time.perf_counter() - begin,
        "threads": torch.get_num_threads(),
        "peers": peer_versions(method.kind),
    }


def peer_versions(kind: str) -> dict[str, str]:
    """Return the versions of what a kind of method needs in addition to the project's packages."""
    found = {name: importlib.metadata.version(name) for name in PEERS.get(kind, ())}
    return found | ({"llama.cpp": llamacpp.version()} if kind == "llamacpp" else {})


def quantized_model(job: Job, shown: str) -> tuple[Any, dict[str, Any]]:
    """Return the dense model in float32 with the weights of a method, and the cost of getting them.

    shown: text to calibrate with.
    """
    from transformers import AutoModelForCausalLM

    method, drawn = METHODS[job.method], {"samples": job.samples, "seqlen": job.seqlen}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        calibration = scratch / "calibration.txt"
        calibration.write_text(shown, encoding="utf-8")
        subject = open_subject(
            Path(job.dense), scratch, Path(job.kept), calibration, seed=job.seed, **drawn
        )
        begin, busy = time.perf_counter(), cpu_seconds()
        found = quantize(method, subject)
        seconds, busy = time.perf_counter() - begin, cpu_seconds() - busy
        peak = peak_of_any()
        print(f"    quantized in {seconds:.0f} s", flush=True)
        model: Any = AutoModelForCausalLM.from_pretrained(job.dense, dtype=torch.float32)
        replaced = replace_weights(model, found.weights)
    expected = 0 if method.kind == "dense" else len(subject.plan.layers)
    if replaced != expected:
        raise RuntimeError(f"{job.method} quantized {replaced} layers, {expected} were expected")
    weights = subject.plan.sketched_weights
    kept = sum(tensor.nbytes for tensor in subject.plan.kept.values())
    return model, {
        "quantized_weights": weights,
        "bits_per_weight": found.stored_bits / weights,
        "model_bytes": found.stored_bits // 8 + kept,
        "conversion_seconds": seconds,
        "conversion_cpu_seconds": busy,
        "conversion_peak_bytes": peak,
        "continues": found.continues,
        "predicted_loss": found.predicted_loss,
        "stored_types": found.stored_types,
    }


def held_out_loss(job: Job, model: Any, text: str) -> dict[str, Any]:
    """Return loss and perplexity on a text that no method has seen."""
    from transformers import AutoTokenizer

    with EvaluationProgress(hidden=True) as progress:
        return evaluate_text(
            model,
            AutoTokenizer.from_pretrained(job.dense),
            [text],
            window=job.window,
            stride=job.window,
            limit=job.eval_tokens,
            progress=progress,
        )


@torch.no_grad()
def replace_weights(model: Any, weights: Any) -> int:
    """Put weights into the layers of a model, by path; return their number."""
    count = 0
    for path, weight in weights:
        model.get_submodule(path).weight.copy_(weight)
        count += 1
    return count


def main() -> None:
    quiet_libraries()
    job_path, result = map(Path, sys.argv[1:])
    write_results(result, measure(Job(**json.loads(job_path.read_text()))))


if __name__ == "__main__":
    main()
