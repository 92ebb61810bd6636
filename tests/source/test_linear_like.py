"""The proof that a module computes the plain product with its weight."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spallm_convert.source.linear_like import Proofs
from spallm_convert.source.linear_weights import LinearWeight


class Written(nn.Linear):
    """Write the product in another way."""

    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Scaled(nn.Linear):
    """Multiply by a setting, which may be 1."""

    scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


class InFloats(nn.Linear):
    """Return float32 whatever the input is, as some routers do."""

    def forward(self, x):
        return nn.functional.linear(x.float(), self.weight.float(), self.bias)


class Noisy(nn.Linear):
    """Add noise in training."""

    def forward(self, x):
        y = super().forward(x)
        return y + torch.randn_like(y) if self.training else y


class WithBuffer(nn.Linear):
    """Hold something that a sketched layer would lose."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("limit", torch.ones(1))


class Router(nn.Linear):
    """Return more than one tensor."""

    def forward(self, x):
        y = super().forward(x)
        return y, y.argmax(-1)


def described(module):
    return Proofs().linear_weight(module)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Written, Scaled])
def test_plain_products_are_accepted(kind, bias):
    assert described(kind(24, 40, bias=bias)) == LinearWeight(40, 24)
    assert described(kind(24, 40, bias=bias, device="meta")) == LinearWeight(40, 24)


def test_a_weight_with_a_row_per_input_is_transposed():
    assert described(Conv1D(40, 24)) == LinearWeight(40, 24, transposed=True)
    assert described(Conv1D(24, 24)) == LinearWeight(24, 24, transposed=True)


@pytest.mark.parametrize("kind", [InFloats, Noisy, WithBuffer, Router])
def test_other_computations_are_refused(kind):
    assert described(kind(24, 40)) is None


def test_settings_of_a_module_count():
    proofs, plain, scaled = Proofs(), Scaled(24, 40), Scaled(24, 40)
    scaled.scale = 2.0
    assert proofs.linear_weight(plain) == LinearWeight(40, 24)
    assert proofs.linear_weight(scaled) is None


def test_modules_with_hooks_or_another_forward_are_refused():
    hooked, changed = Written(24, 40), Written(24, 40)
    hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    changed.forward = lambda x: x
    assert described(hooked) is None
    assert described(changed) is None


@pytest.mark.parametrize(
    "module",
    [
        nn.Embedding(24, 40),
        nn.LayerNorm((24, 40)),
        nn.Conv1d(24, 40, 1),
        nn.PReLU(40),
        nn.Bilinear(3, 4, 5),
        nn.ReLU(),
        nn.utils.parametrizations.weight_norm(nn.Linear(24, 40)),
    ],
)
def test_modules_that_are_not_linear_are_refused(module):
    assert described(module) is None


def test_the_module_and_random_numbers_are_not_touched():
    module = Written(24, 40)
    weight, state = module.weight, torch.get_rng_state()
    described(module)
    assert module.weight is weight
    assert module.training
    assert module.in_features == 24
    assert torch.equal(torch.get_rng_state(), state)
