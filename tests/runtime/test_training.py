"""Training in one process: Trainer and its options, and what is saved afterwards."""

import copy
import inspect
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.tiny_models import save_tiny_llama
from helpers.training import (
    assert_close,
    assert_same,
    checkpointing,
    counting,
    losses,
    parameters,
    trainer,
)
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


@pytest.fixture
def model(sketched_llama):
    return load_sketched(sketched_llama, dtype=torch.float32)


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
def test_checkpointing_gives_the_same_loss_and_gradients(sketched_llama, model, reentrant):
    plain_loss, plain = one_step(model.train())
    other = load_sketched(sketched_llama, dtype=torch.float32).train()
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss, gradients = one_step(other, use_cache=False)
    assert torch.equal(loss, plain_loss)
    assert len(gradients) == 14
    assert gradients.keys() == plain.keys()
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_trainer_the_same_curve(sketched_llama, model, tmp_path, reentrant):
    plain = trainer(load_sketched(sketched_llama, dtype=torch.float32), tmp_path)
    plain.train()
    run = trainer(model, tmp_path, **checkpointing(reentrant=reentrant))
    run.train()
    assert losses(run) == losses(plain)
    assert_same(model, plain.model)


def test_accumulated_gradients_are_those_of_the_batch(sketched_llama, model, tmp_path):
    whole = trainer(load_sketched(sketched_llama, dtype=torch.float32), tmp_path)
    whole.train()
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    run = trainer(model, tmp_path, **split)
    run.train()
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    assert_close(parameters(model), parameters(whole.model))


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32_tables(
    sketched_llama, model, tmp_path
):
    exact = trainer(load_sketched(sketched_llama, dtype=torch.float32), tmp_path)
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
    config = SketchConfig(effort="fast", groups_per_row=2, table_dtype="float32")
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
    sketched_llama, model, tmp_path
):
    trainer(model, tmp_path).train()
    model.save_pretrained(tmp_path / "saved")
    original = load_file(sketched_llama / "model.safetensors")
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
def test_a_device_map_trains_and_saves(sketched_llama, tmp_path):
    model = load_sketched(sketched_llama, dtype=torch.float32, device_map="auto")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    before = parameters(model)
    trainer(model, tmp_path / "run", max_steps=1).train()
    tables = [name for name in before if name.endswith(".weight_table")]
    assert all(not torch.equal(model.get_parameter(name), before[name]) for name in tables)
    model.save_pretrained(tmp_path / "saved")
    assert_same(load_sketched(tmp_path / "saved"), model)


def test_code_in_the_folder_is_not_run_unless_trusted(sketched_llama, tmp_path):
    assert inspect.signature(load_sketched).parameters["trust_remote_code"].default is False
    load_sketched(sketched_llama).save_pretrained(tmp_path / "model")
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


def test_tables_that_were_widened_can_be_saved(sketched_llama, tmp_path):
    model = load_sketched(sketched_llama)
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
