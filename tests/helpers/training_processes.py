"""Train in separate processes, of which there may be several, and which may be killed.

    python tests/helpers/training_processes.py JOBS.json

Imports take longer than training, so they are done once and the processes are forked. Each job
writes to its output folder: exits.json (exits-killed.json if it was to be killed), the exit codes
of its processes, negative for a signal; output-RANK.txt, what each process printed;
result-RANK.json; and model/, saved as Trainer does it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.shared_tables import affine_in_processes, shard, swap_tables, tables_in_processes
from helpers.training import counting, losses, trainer
from spallm_convert import load_sketched
from spallm_convert.runtime.parameters import sketched_model, sketched_pairs

#: A job that hangs, because one of its processes has failed, is killed.
_SECONDS = 120


@dataclasses.dataclass(kw_only=True)
class Job:
    model: str  # a sketched folder
    output: str
    processes: int = 1
    dtype: str = "float32"
    by_hand: bool = False  # a loop in torch, with fully_shard where there are several processes
    hashed: bool = False  # whether the model has no index maps
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of Trainer
    resume: bool = False
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    kill_at: int = 0  # the step after which every process sends itself SIGKILL


def run_jobs(jobs, folder):
    """Run jobs one after another, in a separate program."""
    path = folder / "jobs.json"
    path.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    threads["NUMBA_THREADING_LAYER"] = "workqueue"  # its threads survive a fork
    subprocess.run([sys.executable, __file__, path], env=os.environ | threads, check=True)


def outcome(job, rank=0):
    """Return the result of a process of a job that succeeded."""
    output = Path(job.output)
    exits = json.loads((output / "exits.json").read_text())
    printed = "".join(path.read_text() for path in sorted(output.glob("output-*.txt")))
    assert exits == [0] * job.processes, printed
    return json.loads((output / f"result-{rank}.json").read_text())


def main() -> None:
    jobs = [Job(**document) for document in json.loads(Path(sys.argv[1]).read_text())]
    _warm_up(jobs[0])
    for job in jobs:
        output = Path(job.output)
        output.mkdir(parents=True, exist_ok=True)
        (output / "meeting-point").unlink(missing_ok=True)
        exits = _wait([_fork(job, rank) for rank in range(job.processes)])
        name = "exits-killed.json" if job.kill_at else "exits.json"
        (output / name).write_text(json.dumps(exits))


def _warm_up(job: Job) -> None:
    """Import what training imports late, and load the kernels: each child would take a second.

    Nothing of accelerate is made here, because its state belongs to a process.
    """
    from transformers import Trainer  # noqa: F401  # with datasets and pandas

    model = load_sketched(job.model, dtype=torch.float32)
    tokens = counting(1)[0]["input_ids"][None]
    model(input_ids=tokens, labels=tokens).loss.backward()


def _fork(job: Job, rank: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        printed = os.open(f"{job.output}/output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        _train(job, rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(children: list[int]) -> list[int]:
    end = time.monotonic() + _SECONDS
    exits = {}
    while len(exits) < len(children):
        for child in set(children) - exits.keys():
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                exits[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return [exits[child] for child in children]


def _train(job: Job, rank: int) -> None:
    torch.set_num_threads(1)
    os.environ |= job.environment
    if job.processes > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(job.processes), "LOCAL_RANK": str(rank)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(job.processes), "MASTER_ADDR": "localhost"}
        dist.init_process_group(
            "gloo",
            init_method=f"file://{job.output}/meeting-point",  # no port that may be taken
            rank=rank,
            world_size=job.processes,
        )
    if job.by_hand:
        model, curve = _by_hand(job, rank)
    else:
        model, curve = _by_trainer(job, rank)
    pairs = sketched_pairs(sketched_model(model))
    maps = [pair.index_map.parameter for pair in pairs]
    result = {
        "losses": curve,
        "map_bytes": sum(_local(index_map).nbytes for index_map in maps),
        "map_dtypes": sorted({str(index_map.dtype) for index_map in maps}),
        "table_dtypes": sorted({str(pair.table.parameter.dtype) for pair in pairs}),
    }
    if job.by_hand:
        result["tables"] = tables_in_processes(job.model, Path(job.output))
        result["affine"] = affine_in_processes(job.model, Path(job.output))
    Path(f"{job.output}/result-{rank}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


def _by_trainer(job, rank):
    options = {**job.options, "per_device_train_batch_size": 4 // job.processes}
    if job.processes > 1:
        options["ddp_backend"] = "gloo"
    if "fsdp" in options:
        # Later releases of transformers 5 say so themselves; early ones save no whole model else.
        os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"
        _let_accelerate_shard_on_cpus()
    model = load_sketched(job.model, dtype=_dtype(job))
    if rank and options.get("fsdp_config", {}).get("cpu_ram_efficient_loading"):
        for parameter in model.parameters():  # must come from the first process then
            parameter.data.zero_()
    run = trainer(model, job.output, callbacks=[_Kill(job.kill_at)], **options)
    run.train(resume_from_checkpoint=job.resume or None)
    run.save_model(f"{job.output}/model")
    return model, losses(run)


def _by_hand(job, rank):
    model = load_sketched(job.model, dtype=_dtype(job)).train()
    if job.processes > 1:
        shard(model)
    rows = torch.stack([example["input_ids"] for example in counting()])
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    curve = []
    for batch in rows.view(-1, job.processes, 4 // job.processes, rows.shape[1]):
        loss = model(input_ids=batch[rank], labels=batch[rank]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / job.processes
        if job.processes > 1:
            dist.all_reduce(mean)
        curve.append(mean.item())
    if not job.hashed:  # torch cannot gather index maps of no bytes
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state_dict = get_model_state_dict(model, options=whole)
        if rank == 0:
            model.save_pretrained(f"{job.output}/model", state_dict=state_dict)
    return model, curve + swap_tables(model, Path(job.output), rows)


def _dtype(job: Job) -> Any:
    return job.dtype if job.dtype == "auto" else getattr(torch, job.dtype)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def _let_accelerate_shard_on_cpus() -> None:
    """Make accelerate use FSDP on the CPU, where it accepts the options and then uses DDP.

    torch shards on any device, so everything else is the code that runs on GPUs.
    """
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    original = AcceleratorState.__init__

    def initialize(state, *arguments, fsdp_plugin=None, **options):
        original(state, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if state._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(state._mixed_precision)
            state.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = initialize


if __name__ == "__main__":
    main()
