"""Reads of a layer's weight that are found in the source of classes."""

import torch
from torch import nn

from spallm_convert.source.weight_reads import known_reads, read_in_training, read_weights


class Inner(nn.Module):
    """Hold layers that other code reads, or does not read."""

    def __init__(self):
        super().__init__()
        for name in ("up", "down", "gate", "asked", "cast", "eight", "fused", "listed"):
            setattr(self, name, nn.Linear(4, 4))
        self.exact = False
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.up.weight.data.zero_()

    def reset_parameters(self):
        self.up.weight.data.zero_()

    def never_called(self):
        return self.up.weight

    def forward(self, x, cache=None):
        if self.exact:
            return self.down.weight @ x
        if self.training and cache is None:
            return fused(x, self.fused.weight)
        x = self.down(self.up(x)).to(self.asked.weight.device)
        if isinstance(self.eight.weight, torch.Tensor) and self.eight.weight.dtype != torch.uint8:
            x = x.to(self.eight.weight.dtype)
        x = x.to(self.cast.weight.dtype) if self.gate.weight is not None else x
        return x + self.first() + self.layers[0].weight

    def first(self):
        return next(self.listed.parameters()).dtype


class Outer(nn.Module):
    """Read layers of other modules through variables."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Inner(), Inner()])

    def forward(self, x):
        for block in self.blocks:
            block.gate.weight.mul_(2)
        return x


def fused(x, weight):
    return x @ weight


def layers(found):
    return {path.removeprefix("blocks.0.").removesuffix(".weight") for path in found}


def of_first_block(model):
    return [name for name, _ in model.named_parameters() if name.startswith("blocks.0.")]


def weights(model):
    return [name for name in of_first_block(model) if name.endswith(".weight")]


def test_reads_outside_of_a_layer_are_found():
    model = Outer()
    found = read_weights(model, weights(model))
    assert layers(found) == {"gate", "cast", "listed", "layers.0", "layers.1"}
    assert found["blocks.0.gate.weight"] == "Outer.forward"
    assert found["blocks.0.cast.weight"] == "Inner.forward"
    assert found["blocks.0.listed.weight"] == "Inner.first"


def test_settings_make_code_run():
    model = Outer()
    model.blocks[0].exact = True
    assert "down" in layers(read_weights(model, weights(model)))


def test_reads_that_never_run_are_known():
    model = Outer()
    known = known_reads(model, weights(model))
    assert ("blocks.0.down.weight", "Inner.forward") in known
    assert "up" not in layers(path for path, _ in known)


def test_modules_that_read_in_training_are_named():
    model = Outer()
    assert read_in_training(model, ["blocks.1.fused.weight"]) == ["blocks.1"]
    assert read_in_training(model, ["blocks.1.up.weight"]) == []


class UsesMode(Inner):
    """Do something else in training too."""

    def dropped(self, x):
        return nn.functional.dropout(x, training=self.training)


def test_a_module_that_uses_its_mode_for_more_may_not_stay_in_evaluation_mode():
    model = UsesMode()
    assert read_in_training(model, ["fused.weight"]) == []
    assert "fused.weight" in read_weights(model, ["fused.weight"])


def test_attention_of_torch_reads_its_projection():
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2, 16)])
    wanted = ["0.out_proj.weight", "1.linear1.weight"]
    assert read_weights(model, wanted) == {
        "0.out_proj.weight": "MultiheadAttention.forward",
        "1.linear1.weight": "TransformerEncoderLayer.forward",
    }
