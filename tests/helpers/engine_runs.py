"""Run jobs with vLLM's engine in a process: `python -m helpers.engine_runs JOBS ANSWERS`.

vLLM for CPUs does not start if numba has been imported, and engines of one process share what they
start, so the tests do not import vLLM.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

#: One process, short waits, and nothing asked of any server.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "NUMBA_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "spallm",
}


def job(model, batches, sets=None, **options):
    """Describe an engine and what it is asked.

    Args:
        model: Folder of the model.
        batches: Lists of requests (prompt, name of a set or None, maybe the height and width of an
            image). A batch may instead be the name of a method of the workers and its arguments, or
            "push" and the folder of a set whose tensors are pushed into the model.
        sets: Folders of sets by name.
        options: Options of the engine.
    """
    sets = {name: str(folder) for name, folder in (sets or {}).items()}
    return {"model": str(model), "batches": batches, "sets": sets, "options": options}


def run_jobs(jobs, folder, seconds=600, **environment):
    """Run jobs in one new process and return their answers; those of a job are one list.

    An answer is a dict of a request: its prompt, set, tokens and log-probabilities. A job that
    failed has the text of its error instead.
    """
    asked, answered = folder / "jobs.json", folder / "answers.json"
    asked.write_text(json.dumps(jobs))
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "helpers.engine_runs", asked, answered],
        env=os.environ | ENVIRONMENT | environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(answered.read_text()), done.stdout + done.stderr


def _run(description, asked=8):
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 16,
    } | description["options"]
    if description["sets"]:
        options = {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 2} | options
    engine = LLM(description["model"], **options)
    _start_once()
    requests = {
        name: LoRARequest(name, number, folder)
        for number, (name, folder) in enumerate(description["sets"].items(), 1)
    }
    parameters = SamplingParams(temperature=0, max_tokens=asked, logprobs=1, ignore_eos=True)
    answers = []
    for batch in description["batches"]:
        if isinstance(batch[0], str):
            if batch[0] == "push":
                _push(engine, batch[1])
            else:
                engine.collective_rpc(batch[0], args=tuple(batch[1:]))
            engine.reset_prefix_cache()
            continue
        outputs = engine.generate(
            [_prompt(*request) for request in batch],
            parameters,
            lora_request=[requests.get(name) for _, name, *_ in batch],
            use_tqdm=False,
        )
        for (_, name, *_), output in zip(batch, outputs, strict=True):
            (best,) = output.outputs
            tokens = list(best.token_ids)
            logprobs = [row[t].logprob for row, t in zip(best.logprobs, tokens, strict=True)]
            answers.append(
                {
                    "prompt": list(output.prompt_token_ids),
                    "set": name,
                    "tokens": tokens,
                    "logprobs": logprobs,
                    "asked": asked,
                }
            )
    return answers


def _push(engine, folder):
    """Do what trainers do after each step (TRL's mode "colocate")."""
    from safetensors.torch import load_file

    model = engine.llm_engine.model_executor.driver_worker.model_runner.model
    for name, tensor in load_file(Path(folder) / "sketch_tables.safetensors").items():
        model.load_weights([(name, tensor)])


def image(height, width):
    """Return an image of noise, uint8 [height, width, 3]."""
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


def _prompt(tokens, name, size=None):
    prompt = {"prompt_token_ids": tokens}
    if size is not None:
        from PIL import Image

        prompt["multi_modal_data"] = {"image": Image.fromarray(image(*size))}
    return prompt


def _start_once():
    """Let a second engine start in this process, where numba has been imported by then."""
    from vllm.platforms import current_platform

    type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)


def main(asked, answered):
    results = []
    for description in json.loads(Path(asked).read_text()):
        try:
            results.append(_run(description))
        except Exception as error:  # the test says whether it expects one
            results.append(f"{type(error).__name__}: {error}")
        gc.collect()
    Path(answered).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
