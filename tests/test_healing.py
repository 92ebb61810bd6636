"""What healing is made of: its loss and its schedule. What it gains: test_calibration.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from spallm_convert import devices
from spallm_convert.calibration.healing import Divergence, rate_factor


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Gradients of bfloat16 logits are rounded to its eight bits, twice.
    [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)],
)
def test_divergence_and_its_gradient_are_those_of_torch(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    # More tokens than are in float32 at a time, and not a multiple of them.
    found, expected = (torch.randn(300, 50, generator=generator).to(dtype) for _ in range(2))
    found.requires_grad_()
    total = Divergence.apply(found, expected)
    (total / 7).backward()
    wide = found.detach().double().requires_grad_()
    target = log_softmax(expected.double(), -1)
    exact = kl_div(log_softmax(wide, -1), target, reduction="sum", log_target=True)
    (exact / 7).backward()
    assert total.item() == pytest.approx(exact.item(), rel=1e-5)
    assert found.grad.dtype == dtype
    largest = wide.grad.abs().max().item()
    torch.testing.assert_close(found.grad.double(), wide.grad, rtol=0, atol=tolerance * largest)


def test_the_rate_rises_and_falls():
    rates = [rate_factor(step, 100) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[9] == rates[10] == 1
    assert rates[11:] == sorted(rates[11:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert [rate_factor(step, 1) for step in range(1)] == [1]


@pytest.mark.parametrize("fast", [True, False])
def test_products_are_in_bfloat16_where_that_is_fast(fast, monkeypatch):
    monkeypatch.setattr(devices, "has_fast_bfloat16", lambda device: fast)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    with devices.fast_products(torch.device("cpu")):
        product, total = x @ x, x + x
    assert product.dtype == (torch.bfloat16 if fast else torch.float32)
    assert total.dtype == torch.float32


def test_what_multiplies_is_named(monkeypatch):
    cpu = torch.device("cpu")
    assert isinstance(devices.has_fast_bfloat16(cpu), bool)
    for fast, name in ((True, "cpu, bfloat16"), (False, "cpu")):
        monkeypatch.setattr(devices, "has_fast_bfloat16", lambda device, fast=fast: fast)
        assert devices.device_name(cpu) == name


def test_peak_memory_is_in_bytes():
    # torch alone takes a hundred megabytes; no machine for tests has a terabyte.
    assert 10**8 < devices.peak_memory(torch.device("cpu")) < 10**12
