"""Experts whose weights are sketched: in every layout of the checkpoint, and in every use."""

import copy
import inspect
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import Transpose

from helpers.architectures import save_tiny
from helpers.decoded import fingerprint, modules_of, save_decoded, tensors_of
from helpers.tuning import logits, train
from spallm_convert import (
    FormatError,
    SketchConfig,
    convert,
    load_sketched,
    load_tables,
    save_tables,
)
from spallm_convert.runtime.experts import SketchedExperts

#: The number of modules that hold sketched experts, by class of the model.
MODELS = {
    "MixtralForCausalLM": 2,  # apart, under other names
    "DeepseekV3ForCausalLM": 1,  # apart, only in the second block
    "GptOssForCausalLM": 2,  # fused and transposed, with biases
    "Llama4ForCausalLM": 1,  # fused and transposed, in every other block, in one product
    "DbrxForCausalLM": 2,  # fused in two dimensions, in a module inside the module of experts
    "JetMoeForCausalLM": 8,  # fused; attention has experts too
    # Transposed while loading. Early versions transpose whatever is stored, so it stays dense.
    "Qwen3VLMoeForConditionalGeneration": (
        2 if "check_dims" in inspect.signature(Transpose).parameters else 0
    ),
}


@dataclass(frozen=True)
class Made:
    name: str
    source: Path
    folder: Path

    def load(self, **options: Any) -> Any:
        return load_sketched(self.folder, dtype=torch.float32, **options)

    def decoded(self, folder: Path) -> Any:
        model_class = getattr(transformers, self.name)
        return model_class.from_pretrained(save_decoded(self.folder, self.source, folder))


def make(name, folder):
    source = save_tiny(name, folder / "source")
    convert(
        source, folder / "out", SketchConfig(effort="fast", groups_per_row=2, table_dtype="float32")
    )
    return Made(name, source, folder / "out")


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory):
    return make(request.param, tmp_path_factory.mktemp(request.param))


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, SketchedExperts)]


def test_outputs_are_those_of_the_decoded_weights(made, tmp_path):
    model = made.load()
    assert len(experts_of(model)) == MODELS[made.name]
    found, expected = logits(model), logits(made.decoded(tmp_path / "decoded"))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_is_saved_is_what_was_loaded(made, tmp_path):
    load_sketched(made.folder).save_pretrained(tmp_path)
    found, expected = tensors_of(tmp_path), tensors_of(made.folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    configs = [json.loads((f / "config.json").read_text()) for f in (tmp_path, made.folder)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_trained_tables_are_saved_with_and_without_the_model(made, tmp_path):
    model = made.load().train()
    before = logits(model)
    train(model, steps=1)
    trained = logits(model)
    assert not torch.equal(trained, before)
    for module in experts_of(model):
        assert all(p.grad is not None for n, p in module.named_parameters() if "_table" in n)
    save_tables(model, tmp_path / "tables")
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(load_sketched(tmp_path / "model")), trained)
    again = made.load(tables=tmp_path / "tables")
    assert torch.equal(logits(again), trained)
    again.set_tables("base")
    assert torch.equal(logits(again), before)


def test_tables_have_the_names_and_the_fingerprint_of_the_checkpoint(made, tmp_path):
    save_tables(made.load(), tmp_path)
    found = load_file(tmp_path / "sketch_tables.safetensors")
    expected = {f"{tensor}_table": table for _, _, tensor, _, table in modules_of(made.folder)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value.float()) for name, value in expected.items())
    described = json.loads((tmp_path / "sketch_tables.json").read_text())
    assert described["fingerprint"] == fingerprint(made.folder)


def test_copies_and_pickles_compute_the_same(made):
    model = made.load()
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(experts_of(other)) == MODELS[made.name]
        assert torch.equal(logits(other), expected)
        assert other.state_dict().keys() == model.state_dict().keys()


def test_dequantized_models_have_dense_experts(made):
    model = made.load()
    expected = logits(model)
    dense = getattr(transformers, made.name)(model.config)
    shapes = {name: value.shape for name, value in dense.state_dict().items()}
    model.dequantize()
    assert not experts_of(model)
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_tables_of_another_model_are_refused_in_the_names_of_the_checkpoint(made, tmp_path):
    model = made.load()
    save_tables(model, tmp_path)
    path = tmp_path / "sketch_tables.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(name for name in tensors if "expert" in name or "mlp" in name)
    tensors[name] = tensors[name][:1].contiguous()
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(FormatError, match=f"{name} has the shape"):
        load_tables(model, tmp_path)
