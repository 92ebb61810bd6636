"""Read weights of a checkpoint into modules that were built without weights, and free them."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spallm_convert.calibration.blocks.weights import Weights, forget
from spallm_convert.source.stored_names import LoadedNames, Piece, matrix_rows
from spallm_formats import read_header


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.device("meta"):
            self.inner = nn.Linear(3, 2)
            self.empty = nn.Parameter(torch.empty(0, 4))
            self.register_buffer("kept", torch.empty(2))
            self.register_buffer("made", torch.empty(2), persistent=False)


def test_weights_are_read_and_forgotten(tmp_path):
    stored = {
        "at.inner.weight": torch.randn(2, 3, dtype=torch.bfloat16),
        "at.inner.bias": torch.randn(3),  # not of the shape that the module has
        "at.empty": torch.empty(0, 4),
        "at.kept": torch.randn(2),
        "at.made": torch.randn(2),
    }
    save_file(stored, tmp_path / "model.safetensors")
    module = Module()
    tensors = read_header(tmp_path / "model.safetensors")
    rows = matrix_rows((name, tensor.shape) for name, tensor in tensors.items())
    pieces = {name: (Piece(name, 0, rows[name]),) for name in tensors}
    names = LoadedNames(pieces, {}, {}, frozenset())
    weights = Weights(tensors, names, torch.float32, torch.device("cpu"))
    assert weights.missing(module, "at") == ["at.inner.bias"]
    weights.fill(module, "at")
    assert torch.equal(module.inner.weight, stored["at.inner.weight"].float())
    assert torch.equal(module.kept, stored["at.kept"])
    assert module.empty.shape == (0, 4)
    assert not module.empty.is_meta
    assert module.inner.bias.is_meta
    assert module.made.is_meta
    for part in module.modules():
        forget(part)
    assert module.inner.weight.is_meta
    assert not module.kept.is_meta


class Formed(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.device("meta"):
            self.joined = nn.Linear(3, 4)
            self.part = nn.Linear(3, 2, bias=False)
            self.experts = nn.Parameter(torch.empty(2, 2, 3))
            self.turned = nn.Parameter(torch.empty(2, 5, 3))
            self.tied = nn.Parameter(torch.empty(4, 3))


def test_parameters_are_formed_of_the_rows_that_are_stored(tmp_path):
    stored = {name: torch.randn(2, 3) for name in ("a", "b", "e0", "e1")}
    stored |= {"bias0": torch.randn(1), "bias1": torch.randn(3), "t": torch.randn(2, 3, 5)}
    save_file(stored, tmp_path / "model.safetensors")
    whole = {"a": 2, "b": 2, "e0": 2, "e1": 2, "bias0": 1, "bias1": 3, "t": 6}
    formed = {
        "at.joined.weight": ["a", "b"],
        "at.joined.bias": ["bias0", "bias1"],
        "at.experts": ["e0", "e1"],
        "at.turned": ["t"],
    }
    pieces = {n: tuple(Piece(t, 0, whole[t]) for t in of) for n, of in formed.items()}
    pieces["at.part.weight"] = Piece("a", 1, 1), Piece("b", 0, 1)
    names = LoadedNames(pieces, {}, {}, frozenset({"at.turned"}))
    tensors = read_header(tmp_path / "model.safetensors")
    tied = {"at.tied": "at.joined.weight"}
    weights = Weights(tensors, names, torch.float32, torch.device("cpu"), tied)
    module = Formed()
    assert weights.missing(module, "at") == []
    weights.fill(module, "at")
    assert torch.equal(module.joined.weight, torch.cat([stored["a"], stored["b"]]))
    assert torch.equal(module.joined.bias, torch.cat([stored["bias0"], stored["bias1"]]))
    assert torch.equal(module.part.weight, torch.cat([stored["a"][1:], stored["b"][:1]]))
    assert torch.equal(module.experts, torch.stack([stored["e0"], stored["e1"]]))
    assert torch.equal(module.turned, stored["t"].transpose(1, 2))
    assert torch.equal(module.tied, module.joined.weight)


@pytest.mark.parametrize("rows", [2, 3])
def test_matrices_that_are_always_transposed(rows, tmp_path):
    """The shape does not say so if a matrix is square."""
    stored = {"t": torch.randn(3, rows), "wrong": torch.randn(rows, 3)}
    save_file(stored, tmp_path / "model.safetensors")
    with torch.device("meta"):
        module = nn.Linear(3, rows, bias=False)
    tensors = read_header(tmp_path / "model.safetensors")

    def read(name):
        turned = {"at.weight": Piece(name, 0, tensors[name].shape[0])}
        names = LoadedNames({}, {}, {}, frozenset(turned), turned)
        return Weights(tensors, names, torch.float32, torch.device("cpu"))

    assert read("wrong").missing(module, "at") == (["at.weight"] if rows == 2 else [])
    weights = read("t")
    assert weights.missing(module, "at") == []
    weights.fill(module, "at")
    assert torch.equal(module.weight, stored["t"].T)
