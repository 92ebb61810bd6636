"""Training in processes of their own: killed and resumed, and several that train one model."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.architectures import save_tiny
from helpers.training import assert_close, assert_same, checkpointing, counting, parameters
from helpers.training_processes import Job, outcome, run_jobs
from spallm_convert import SketchConfig, convert, load_sketched

TOKENS = torch.stack([example["input_ids"] for example in counting(4)])
FSDP = {
    "fsdp": True,
    "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}
pytestmark = [
    pytest.mark.apart,
    # transformers 5.23 still calls its own gradient_checkpointing_enable, by its new name.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def hashed_folder(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hashed") / "out"
    convert(
        tiny_llama.folder, folder, SketchConfig(effort="fast", groups_per_row=2, mapping="hash")
    )
    return folder


@pytest.fixture(scope="module")
def experts_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    source = save_tiny("MixtralForCausalLM", folder / "source", vocab_size=128)
    convert(source, folder / "out", SketchConfig(effort="fast", groups_per_row=2))
    return folder / "out"


@pytest.fixture(scope="module")
def jobs(sketched_llama, hashed_folder, experts_folder, tmp_path_factory):
    """Runs that need processes of their own, all in one go."""
    folder = tmp_path_factory.mktemp("jobs")
    often = {"save_strategy": "steps", "save_steps": 2}
    efficient = {**FSDP["fsdp_config"], "cpu_ram_efficient_loading": True}
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    wanted = {
        "whole": {"options": often},
        "killed": {"options": often, "kill_at": 5},
        "resumed": {"output": "killed", "options": often, "resume": True},
        "ddp": {"processes": 2, "options": checkpointing(reentrant=False)},
        "fsdp": {"processes": 2, "options": FSDP},
        "fsdp killed": {"processes": 2, "options": FSDP | often, "kill_at": 5},
        "fsdp resumed": {
            "processes": 2,
            "output": "fsdp killed",
            "options": FSDP | often,
            "resume": True,
        },
        "fsdp from one process": {
            "processes": 2,
            "options": FSDP | {"fsdp_config": efficient},
            "environment": environment,
        },
        "fsdp in bfloat16": {"processes": 2, "dtype": "auto", "options": FSDP | {"bf16": True}},
        "by hand": {"by_hand": True},
        "by hand, sharded": {"processes": 2, "by_hand": True},
        "hashed": {"hashed": True, "by_hand": True},
        "hashed, sharded": {"hashed": True, "processes": 2, "by_hand": True},
        "experts": {"model": experts_folder, "by_hand": True},
        "experts, sharded": {"model": experts_folder, "processes": 2, "by_hand": True},
    }
    found = {}
    for name, options in wanted.items():
        output = str(folder / options.pop("output", name).replace(" ", "-"))
        model = options.pop("model", hashed_folder if options.get("hashed") else sketched_llama)
        found[name] = Job(model=str(model), output=output, **options)
    run_jobs(found.values(), folder)
    return found


def test_killed_and_resumed_the_curve_goes_on_as_if_uninterrupted(jobs):
    exits = json.loads((Path(jobs["killed"].output) / "exits.json").read_text())
    assert exits == [0]  # of the run that went on
    whole, resumed = outcome(jobs["whole"]), outcome(jobs["resumed"])
    assert len(whole["losses"]) == 6
    assert resumed["losses"] == whole["losses"]
    assert_same(saved(jobs["resumed"]), saved(jobs["whole"]))


def test_the_killed_runs_were_killed(jobs):
    for name, processes in {"killed": 1, "fsdp killed": 2}.items():
        exits = json.loads((Path(jobs[name].output) / "exits-killed.json").read_text())
        assert exits == [-signal.SIGKILL] * processes


def test_two_processes_that_copy_the_model_give_the_same_loss(jobs):
    whole, copied = outcome(jobs["whole"]), outcome(jobs["ddp"])
    assert copied["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert outcome(jobs["ddp"], rank=1)["map_bytes"] == copied["map_bytes"] == whole["map_bytes"]
    assert_close(parameters(saved(jobs["ddp"])), parameters(saved(jobs["whole"])))


def test_two_processes_that_share_the_model_give_the_same_loss(jobs):
    whole = outcome(jobs["whole"])
    shards = [outcome(jobs["fsdp"], rank) for rank in range(2)]
    assert shards[0]["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert sum(shard["map_bytes"] for shard in shards) == whole["map_bytes"]
    assert all(shard["map_bytes"] < whole["map_bytes"] for shard in shards)
    assert all(shard["map_dtypes"] == ["torch.uint8"] for shard in shards)
    assert_close(parameters(saved(jobs["fsdp"])), parameters(saved(jobs["whole"])))


def test_a_shared_model_that_was_killed_goes_on_too(jobs):
    whole, resumed = outcome(jobs["fsdp"]), outcome(jobs["fsdp resumed"])
    assert resumed["losses"] == whole["losses"]
    assert_same(saved(jobs["fsdp resumed"]), saved(jobs["fsdp"]))


def test_a_shared_model_may_come_from_one_process(jobs):
    assert outcome(jobs["fsdp from one process"])["losses"] == outcome(jobs["fsdp"])["losses"]
    assert_same(saved(jobs["fsdp from one process"]), saved(jobs["fsdp"]))


def test_a_shared_bfloat16_model_trains_float32_tables(jobs):
    found = outcome(jobs["fsdp in bfloat16"])
    assert found["table_dtypes"] == ["torch.float32"]
    assert found["losses"] == pytest.approx(outcome(jobs["fsdp"])["losses"], rel=0.05)
    model = saved(jobs["fsdp in bfloat16"])
    tables = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in tables} == {torch.float32}
    assert any(not torch.equal(p, p.bfloat16().float()) for p in tables)


def test_torchs_own_sharding_gives_the_same_loss(jobs):
    whole, shared = outcome(jobs["by hand"]), outcome(jobs["by hand, sharded"])
    assert shared["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert shared["map_bytes"] < whole["map_bytes"]
    assert_close(parameters(saved(jobs["by hand, sharded"])), parameters(saved(jobs["by hand"])))


@pytest.mark.parametrize("name", ["by hand", "by hand, sharded"])
def test_tables_are_saved_and_swapped_on_whole_and_shared_models(jobs, name):
    job = jobs[name]
    for rank in range(job.processes):
        trained, loaded, base_changed, again = outcome(job, rank)["losses"][-4:]
        assert trained == loaded == again != base_changed
    tables = load_file(Path(job.output) / "tables/sketch_tables.safetensors")
    model = saved(job)
    assert len(tables) == 14
    assert all(torch.equal(model.get_parameter(name), value) for name, value in tables.items())


@pytest.mark.parametrize("name", ["by hand", "by hand, sharded"])
def test_what_is_trained_with_a_set_leaves_the_base_as_it_was(jobs, name):
    job = jobs[name]
    for rank in range(job.processes):
        found = outcome(job, rank)["tables"]
        assert found["head was trained"]
        assert found["base has its head"]


@pytest.mark.parametrize("name", ["by hand", "by hand, sharded"])
def test_every_process_is_told_that_tables_could_not_be_saved(jobs, name):
    job = jobs[name]
    for rank in range(job.processes):
        found = outcome(job, rank)["tables"]
        assert "OptionError" in found["refused"]
        assert "already holds sketch tables" in found["refused"]
        assert "is a file, expected a folder" in found["a file"]
        assert found["no folder"].startswith("NotADirectoryError")


def test_one_process_alone_saves_the_tables_of_a_model_that_is_not_shared(jobs):
    outcome(jobs["by hand, sharded"])
    saved = Path(jobs["by hand, sharded"].output) / "by the first process"
    load_sketched(jobs["by hand"].model, tables=saved)


def test_tables_that_a_shared_model_would_round_are_refused(jobs):
    for rank in range(2):
        found = outcome(jobs["by hand, sharded"], rank)["tables"]["too wide"]
        assert "the model is sharded with tables in torch.bfloat16, which would round" in found


def test_affine_sets_are_trained_and_swapped_on_whole_and_shared_models(jobs):
    whole, *shards = (
        outcome(jobs[name], rank)["affine"]
        for name, rank in (("by hand", 0), ("by hand, sharded", 0), ("by hand, sharded", 1))
    )
    for found in (whole, *shards):
        assert found["again"] == found["trained"] != found["base"]
        assert found["trained"] == pytest.approx(whole["trained"], rel=1e-5)
    assert whole["refused"] == ""
    message = "the model is sharded and has no affine numbers, expected them to be added first"
    assert all(message in found["refused"] for found in shards)
    saved = [
        load_file(Path(jobs[name].output) / "affine/sketch_tables.safetensors")
        for name in ("by hand", "by hand, sharded")
    ]
    assert_close(*saved)


def test_a_hashed_model_is_shared_too(jobs):
    whole, shared = outcome(jobs["hashed"]), outcome(jobs["hashed, sharded"])
    assert shared["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    tables = [
        load_file(Path(jobs[name].output) / "tables/sketch_tables.safetensors")
        for name in ("hashed", "hashed, sharded")
    ]
    assert_close(*tables)
    load_sketched(jobs["hashed"].model, tables=Path(jobs["hashed, sharded"].output) / "tables")


def test_experts_are_shared_too(jobs):
    whole, shared = jobs["experts"], jobs["experts, sharded"]
    shards = [outcome(shared, rank) for rank in range(2)]
    assert shards[0]["losses"] == pytest.approx(outcome(whole)["losses"], rel=1e-4)
    assert sum(shard["map_bytes"] for shard in shards) == outcome(whole)["map_bytes"]
    assert max(shard["map_bytes"] for shard in shards) < 0.6 * outcome(whole)["map_bytes"]
    assert_close(parameters(saved(shared)), parameters(saved(whole)))
    tables = [
        load_file(f"{job.output}/tables/sketch_tables.safetensors") for job in (whole, shared)
    ]
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight_table" in tables[0]
    assert_close(*tables)
    load_sketched(whole.model, tables=Path(shared.output) / "tables")


def saved(job):
    return load_sketched(Path(job.output) / "model")
