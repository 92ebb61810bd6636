"""Read weights of a checkpoint into modules that were built without weights, and free them."""

import torch
from safetensors.torch import save_file
from torch import nn

from spallm_convert.calibration.blocks.weights import Weights, forget
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
    weights = Weights(
        read_header(tmp_path / "model.safetensors"), torch.float32, torch.device("cpu")
    )
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
