"""Sensitivities: equal to those of plain autograd, and good predictors of the divergence."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from helpers.blocks import open_blocks, run_through
from helpers.tiny_models import save_tiny_llama
from spallm_convert import CalibrationError
from spallm_convert.calibration.allocation import sensitivity
from spallm_convert.calibration.allocation.sensitivity import draw_labels, sensitivities

TOKENS = torch.randint(2, 128, (6, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def folder(tmp_path_factory, request):
    """Save a model whose predictions are not uniform, with its own or a tied head."""
    return save_tiny_llama(
        tmp_path_factory.mktemp("model"),
        tie_word_embeddings=request.param,
        initializer_range=0.1,
        dtype=torch.float32,
    ).folder


def layers_of(model):
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and "layers." in n}


def found(folder, tokens=TOKENS, seed=0, batch=2):
    blocks = open_blocks(folder, tokens, batch=batch)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return sensitivities(blocks, tokens, layers_of(model), seed=seed, say=lambda line: None)


def test_they_are_those_of_the_whole_model(folder, monkeypatch):
    labels = torch.randint(0, 128, TOKENS.shape, generator=torch.Generator().manual_seed(4))
    given = iter(labels)
    monkeypatch.setattr(sensitivity, "draw_labels", lambda logits, generator: next(given))
    by_blocks = found(folder)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    outputs = {}
    for name, layer in layers_of(model).items():
        layer.register_forward_hook(
            lambda module, args, output, name=name: outputs.update({name: output})
        )
    logits = model(TOKENS).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    assert by_blocks.keys() == outputs.keys()
    for name, gradient in zip(outputs, gradients, strict=True):
        squares, measured = gradient.flatten(0, 1).double().square(), by_blocks[name]
        assert squares.max() > 0
        assert torch.allclose(torch.from_numpy(measured.rows), squares.mean(0), rtol=1e-3)
        by_token = (squares.mean(1) / squares.mean()).float()
        assert torch.allclose(measured.tokens, by_token, rtol=1e-3, atol=1e-6)


def test_a_layer_that_is_called_again_keeps_its_order(tmp_path, monkeypatch):
    """Check the order of tokens: gradients arrive from the last call to the first."""

    class Twice(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.inner = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

        def forward(self, hidden):
            return self.inner(hidden) + 0.01 * self.inner(hidden.flip(1)).flip(1)

    monkeypatch.setattr(modeling_llama, "LlamaMLP", Twice)
    folder = save_tiny_llama(tmp_path / "model").folder
    for name, values in found(folder, batch=2).items():
        if "mlp" in name:
            first, second = values.tokens.view(3, 2, 48).unbind(1)
            assert torch.allclose(1e-4 * first, second.view(3, 2, 24).flip(2).flatten(1), rtol=1e-3)


def test_blocks_can_be_gone_through_afterwards(folder):
    blocks = open_blocks(folder, TOKENS)
    names = layers_of(AutoModelForCausalLM.from_pretrained(folder))
    sensitivities(blocks, TOKENS, names, seed=0, say=lambda line: None)
    assert all(p.is_meta for p in blocks._model.parameters())
    hidden = run_through(blocks)
    with torch.no_grad():
        model = blocks.assemble(lambda path, layer: None)
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS[:2])
    assert torch.equal(model(TOKENS[:2]).logits, expected.logits)
    assert torch.equal(blocks.logits(TOKENS[:2], hidden), expected.logits)


def test_no_more_of_the_text_is_taken_than_needed(folder, monkeypatch):
    monkeypatch.setattr(sensitivity, "TOKENS", 2 * 2 * 24 + 1)
    some = found(folder)
    monkeypatch.undo()
    first, whole = found(folder, TOKENS[:4]), found(folder)
    for name, values in some.items():
        assert (values.rows == first[name].rows).all()
        assert torch.equal(values.tokens, first[name].tokens)
        assert not (values.rows == whole[name].rows).all()


def test_labels_are_drawn_as_they_are_predicted_from_a_seed(folder):
    logits = torch.tensor([0.2, 0.7, 0.1]).log().expand(20000, 3)
    labels = draw_labels(logits, torch.Generator().manual_seed(0))
    shares = labels.bincount(minlength=3) / len(labels)
    assert torch.allclose(shares, torch.tensor([0.2, 0.7, 0.1]), atol=0.02)
    state = torch.random.get_rng_state()
    first, again, other = found(folder), found(folder), found(folder, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, values in first.items():
        assert (values.rows == again[name].rows).all()
        assert torch.equal(values.tokens, again[name].tokens)
        assert not (values.rows == other[name].rows).all()


def test_they_predict_the_divergence_of_a_model_with_small_errors(folder):
    """Check that predictions are within a third of the divergence.

    For v_proj the bound is lower: attention sums its outputs over positions, which are treated as
    independent but are not.
    """
    tokens = torch.randint(2, 128, (64, 24), generator=torch.Generator().manual_seed(5))
    costs = found(folder, tokens, batch=16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        expected = model(tokens).logits.log_softmax(-1)
        for name, layer in layers_of(model).items():
            inputs = []
            handle = layer.register_forward_pre_hook(
                lambda module, args, inputs=inputs: inputs.append(args[0].flatten(0, 1))
            )
            model(tokens)
            handle.remove()
            error = 0.02 * layer.weight.std() * torch.randn(layer.weight.shape, generator=generator)
            moved = costs[name].tokens @ (inputs[0] @ error.T).square()
            predicted = float(costs[name].rows @ moved.numpy()) / 2 / tokens.numel()
            layer.weight += error
            found_logits = model(tokens).logits.log_softmax(-1)
            layer.weight -= error
            divergence = (expected.exp() * (expected - found_logits)).sum(-1).mean().item()
            assert divergence > 0
            assert (0.3 if "v_proj" in name else 0.7) < predicted / divergence < 1.33, name


def test_gradients_that_are_no_numbers_are_named(folder, monkeypatch):
    def broken(logits, generator):
        return torch.full(logits.shape[:1], -100)  # ignored, so the gradient is zero

    monkeypatch.setattr(sensitivity, "draw_labels", broken)
    assert all(not v.rows.any() and not v.tokens.any() for v in found(folder).values())
    inf = torch.tensor(torch.inf)
    monkeypatch.setattr(nn.functional, "cross_entropy", lambda x, *a, **k: x.sum() * inf)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.\S+: the gradients"):
        found(folder)


def test_heads_that_are_not_stored_are_refused(tmp_path):
    model = save_tiny_llama(tmp_path / "model", hidden_size=32, intermediate_size=48).folder
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match=r"LlamaForCausalLM cannot predict: .* for lm_head"):
        sensitivities(open_blocks(model, TOKENS), TOKENS, (), seed=0, say=lambda line: None)
