"""Fixtures that tests of kernels share."""

import pytest

from spallm_kernels.cpu.vector_units import CHOICE, available_units, host_unit


@pytest.fixture(params=available_units())
def unit(request, monkeypatch):
    """The name of a vector unit of this machine, which the test then runs on."""
    monkeypatch.setenv(CHOICE, request.param)
    host_unit.cache_clear()
    yield request.param
    host_unit.cache_clear()
