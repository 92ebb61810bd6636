"""Training: Trainer and its options, kills, several processes, what is saved afterwards."""

import copy
import inspect
import json
import pickle
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.tiny_models import save_tiny_llama
from helpers.training import checkpointing, counting, losses, parameters, trainer
from helpers.training_processes import Job, outcome, run_jobs
from spallm_convert import SketchConfig, SketchedLinear, convert, load_sketched

TOKENS = torch.stack([example["input_ids"] for example in counting(4)])
FSDP = {
    "fsdp": True,
    "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}
pytestmark = [
    # transformers 5.23 still calls its own gradient_checkpointing_enable, by its new name.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def sketched_folder(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sketched") / "out"
    convert(tiny_llama.folder, folder, SketchConfig(groups_per_row=2))
    return folder


@pytest.fixture
def model(sketched_folder):
    return load_sketched(sketched_folder, dtype=torch.float32)


def test_trainer_lowers_the_loss_and_changes_tables_only(model, tmp_path):
    before = parameters(model)
    run = trainer(model, tmp_path, max_steps=40, lr_scheduler_type="constant")
    run.train()
    curve = losses(run)
    assert len(curve) == 40
    assert sum(curve[-3:]) < 0.85 * sum(curve[:3])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.endswith(".weight_table")}
    trained = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}


def one_step(model, **call):
    loss = model(TOKENS, labels=TOKENS, **call).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_loss_and_gradients(sketched_folder, model, reentrant):
    plain_loss, plain = one_step(model.train())
    other = load_sketched(sketched_folder, dtype=torch.float32).train()
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss, gradients = one_step(other, use_cache=False)
    assert torch.equal(loss, plain_loss)
    assert len(gradients) == 14
    assert gradients.keys() == plain.keys()
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_trainer_the_same_curve(sketched_folder, model, tmp_path, reentrant):
    plain = trainer(load_sketched(sketched_folder, dtype=torch.float32), tmp_path)
    plain.train()
    run = trainer(model, tmp_path, **checkpointing(reentrant=reentrant))
    run.train()
    assert losses(run) == losses(plain)
    assert_same(model, plain.model)


def test_accumulated_gradients_are_those_of_the_batch(sketched_folder, model, tmp_path):
    whole = trainer(load_sketched(sketched_folder, dtype=torch.float32), tmp_path)
    whole.train()
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    run = trainer(model, tmp_path, **split)
    run.train()
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    assert_close(parameters(model), parameters(whole.model))


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32_tables(
    sketched_folder, model, tmp_path
):
    exact = trainer(load_sketched(sketched_folder, dtype=torch.float32), tmp_path)
    exact.train()
    layer = model.model.layers[0].mlp.up_proj
    outputs, gradients = set(), set()
    layer.register_forward_hook(lambda module, inputs, output: outputs.add(output.dtype))
    layer.weight_table.register_hook(lambda gradient: gradients.add(gradient.dtype))
    run = trainer(model, tmp_path, bf16=True)
    run.train()
    assert outputs == {torch.bfloat16}
    assert gradients == {layer.weight_table.dtype} == {torch.float32}
    assert losses(run) != losses(exact)
    assert losses(run) == pytest.approx(losses(exact), rel=5e-3)


def test_float32_tables_of_a_bfloat16_model_train(tiny_llama, tmp_path):
    config = SketchConfig(groups_per_row=2, table_dtype="float32")
    convert(tiny_llama.folder, tmp_path / "sketched", config)
    model = load_sketched(tmp_path / "sketched", dtype=torch.bfloat16)
    run = trainer(model, tmp_path / "run", max_steps=12, bf16=True)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    tables = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in tables} == {torch.float32}
    # Steps smaller than bfloat16 can hold are what float32 tables are for.
    assert all(not torch.equal(p, p.bfloat16().float()) for p in tables)
    run.save_model(tmp_path / "saved")
    assert_same(load_sketched(tmp_path / "saved", dtype=torch.bfloat16), model)


def test_the_best_checkpoint_is_loaded_at_the_end(model, tmp_path):
    every = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    run = trainer(
        model,
        tmp_path,
        evaluation=counting(4),
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst, so that it is not what the model holds at the end
        **every,
    )
    run.train()
    found = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(found) == 3
    worst = tmp_path / f"checkpoint-{2 * (1 + found.index(max(found)))}"
    assert Path(run.state.best_model_checkpoint) == worst
    assert found.index(max(found)) < 2
    assert_same(load_sketched(worst, dtype=torch.float32), model)


def test_saved_after_training_maps_are_the_same_bytes_and_tables_the_trained_ones(
    sketched_folder, model, tmp_path
):
    trainer(model, tmp_path).train()
    model.save_pretrained(tmp_path / "saved")
    original = load_file(sketched_folder / "model.safetensors")
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert saved.keys() == original.keys()
    for name, tensor in saved.items():
        if name.endswith(".weight_table"):
            assert torch.equal(tensor, model.get_parameter(name))
            assert not torch.equal(tensor, original[name].float())
        else:
            assert torch.equal(tensor, original[name].to(tensor.dtype))
    again = load_sketched(tmp_path / "saved")
    assert torch.equal(again(TOKENS).logits, model.eval()(TOKENS).logits)
    again.save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()


def test_tied_embeddings_train_and_save(tmp_path):
    tied = save_tiny_llama(tmp_path / "source", tie_word_embeddings=True)
    convert(tied.folder, tmp_path / "out")
    model = load_sketched(tmp_path / "out", dtype=torch.float32)
    before = parameters(model)
    trainer(model, tmp_path / "run", max_steps=1).train()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, before["model.embed_tokens.weight"])
    model.save_pretrained(tmp_path / "saved")
    assert "lm_head.weight" not in load_file(tmp_path / "saved/model.safetensors")
    assert_same(load_sketched(tmp_path / "saved"), model)


# transformers takes a device map with CPUs in it for one that offloads.
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_a_device_map_trains_and_saves(sketched_folder, tmp_path):
    model = load_sketched(sketched_folder, dtype=torch.float32, device_map="auto")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    before = parameters(model)
    trainer(model, tmp_path / "run", max_steps=1).train()
    tables = [name for name in before if name.endswith(".weight_table")]
    assert all(not torch.equal(model.get_parameter(name), before[name]) for name in tables)
    model.save_pretrained(tmp_path / "saved")
    assert_same(load_sketched(tmp_path / "saved"), model)


def test_code_in_the_folder_is_not_run_unless_trusted(sketched_folder, tmp_path):
    assert inspect.signature(load_sketched).parameters["trust_remote_code"].default is False
    load_sketched(sketched_folder).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/theirs.py").write_text("raise SystemExit('their code was run')")
    model = load_sketched(tmp_path / "model", dtype=torch.float32)
    trainer(model, tmp_path / "run", max_steps=1).train()


def test_a_given_state_dict_is_the_one_that_is_saved(model, tmp_path):
    given = {
        name: value + 1 if name.endswith(".weight_table") else value
        for name, value in model.state_dict().items()
    }
    model.save_pretrained(tmp_path / "saved", state_dict=given)
    again = load_sketched(tmp_path / "saved")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in given.items())


def test_a_copy_saves_its_own_tables(model, tmp_path):
    for index, clone in enumerate([copy.deepcopy(model), pickle.loads(pickle.dumps(model))]):
        for module in clone.modules():
            if isinstance(module, SketchedLinear):
                module.weight_table.data += 1
        clone.save_pretrained(tmp_path / str(index))
        assert_same(load_sketched(tmp_path / str(index)), clone)
        assert not torch.equal(clone(TOKENS).logits, model(TOKENS).logits)


def test_tables_that_were_widened_can_be_saved(sketched_folder, tmp_path):
    model = load_sketched(sketched_folder)
    for module in model.modules():
        if isinstance(module, SketchedLinear):
            module.weight_table.data = module.weight_table.data.float() + 1e-4
    model.save_pretrained(tmp_path / "saved")
    assert_same(load_sketched(tmp_path / "saved"), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_that_were_cast_to_floats_give_the_same_output(model, dtype):
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features)
    expected = layer(x)
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(every.to(dtype).to(torch.uint8), every)
    layer.weight = torch.nn.Parameter(layer.weight.to(dtype), requires_grad=False)
    assert torch.equal(layer(x), expected)


def test_a_step_leaves_parameters_whose_memory_can_be_freed(model):
    # As FSDP2 does with what it has gathered. `Tensor.numpy` forbids it for good.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the file that safetensors has mapped
    one_step(model.train())
    assert all(p.untyped_storage().resizable() for p in model.parameters())


@pytest.fixture(scope="module")
def hashed_folder(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hashed") / "out"
    convert(tiny_llama.folder, folder, SketchConfig(groups_per_row=2, mapping="hash"))
    return folder


@pytest.fixture(scope="module")
def jobs(sketched_folder, hashed_folder, tmp_path_factory):
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
    }
    found = {}
    for name, options in wanted.items():
        output = str(folder / options.pop("output", name).replace(" ", "-"))
        model = hashed_folder if options.get("hashed") else sketched_folder
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


def test_a_hashed_model_is_shared_too(jobs):
    whole, shared = outcome(jobs["hashed"]), outcome(jobs["hashed, sharded"])
    assert shared["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    tables = [
        load_file(Path(jobs[name].output) / "tables/sketch_tables.safetensors")
        for name in ("hashed", "hashed, sharded")
    ]
    assert_close(*tables)
    load_sketched(jobs["hashed"].model, tables=Path(jobs["hashed, sharded"].output) / "tables")


def saved(job):
    return load_sketched(Path(job.output) / "model")


def assert_same(model, other):
    """The same parameters, bit for bit, in the same dtypes."""
    found, expected = parameters(model), parameters(other)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def assert_close(found, expected):
    """Equal, but for sums over a batch that were taken in another order."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # AdamW divides by the size of a gradient, so an entry with hardly any may go either way.
        torch.testing.assert_close(value.float(), expected[name].float(), rtol=1e-3, atol=1e-4)
