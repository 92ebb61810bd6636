"""Skips tests of the Triton kernels where Triton is not installed, as it need not be on a CPU."""

import importlib.util

import pytest

NO_TRITON = "Triton is not installed: pip install 'spallm-convert[gpu]'"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason=NO_TRITON)
