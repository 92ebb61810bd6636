"""Measure how fast one engine of vLLM decodes. `__main__.py` runs this in processes."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.shared.machine import cores, write_results

_PROMPT = 16
_FEW = 4
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "NUMBA_NUM_THREADS": str(cores()),
    "OMP_NUM_THREADS": str(cores()),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "spallm",
}


@dataclass(frozen=True)
class Job:
    """Describe an engine and the requests that it gets at once.

    Attributes:
        model: Folder of the model.
        batch: Number of requests.
        sets: Folder of a set for each request. Empty: all are answered by the base.
        tokens: Tokens that are decoded for each request.
    """

    model: str
    batch: int
    sets: list[str] = field(default_factory=list)
    tokens: int = 64


def measure(job: Job) -> dict[str, float]:
    """Return decoded tokens per second, and the seconds to read the tables of all sets."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    folders = list(dict.fromkeys(job.sets))
    options: dict[str, Any] = {}
    if folders:
        options = {"enable_lora": True, "max_loras": len(folders)}
    engine = LLM(
        job.model,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=max(job.batch, 8),
        skip_tokenizer_init=True,
        **options,
    )
    generator = torch.Generator().manual_seed(0)
    shape = (job.batch, _PROMPT)
    prompts = torch.randint(5, 40000, shape, generator=generator).tolist()
    requests = None
    if folders:
        known = {f: LoRARequest(Path(f).name, n, f) for n, f in enumerate(folders, 1)}
        requests = [known[folder] for folder in job.sets]

    def seconds(tokens: int) -> float:
        parameters = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            parameters,
            lora_request=requests,
            use_tqdm=False,
        )
        return time.perf_counter() - start

    for tokens in (_FEW, _FEW + job.tokens):  # compiles kernels and starts threads
        seconds(tokens)
    few = min(seconds(_FEW) for _ in range(2))
    many = min(seconds(_FEW + job.tokens) for _ in range(2))
    found = {"tokens_per_second": job.batch * job.tokens / (many - few)}
    if folders:
        found["seconds_to_read"] = _reading(sum(_bytes(folder) for folder in folders))
    return found


def _bytes(folder: str) -> int:
    return (Path(folder) / "sketch_tables.safetensors").stat().st_size


def _reading(nbytes: int) -> float:
    """Return the seconds to read that many bytes of memory once."""
    import torch

    values = torch.ones(nbytes // 4, dtype=torch.float32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        values.sum()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    os.environ |= _ENVIRONMENT  # before vLLM is imported
    described, result = map(Path, sys.argv[1:])
    write_results(result, measure(Job(**json.loads(described.read_text()))))
