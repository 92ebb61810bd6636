"""The check of GPU kernels: what it finds.

Kernels are plain torch here, some of them made wrong. The real ones run in Triton's interpreter, or
on a GPU if there is one.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from helpers.planted_kernels import kernels, uncompiled, wrong
from helpers.triton_needed import needs_triton
from spallm_kernels.dispatch import load_decoder
from spallm_kernels.reference import linear as reference
from spallm_kernels.self_check import LAYERS, Layer, find_fault

ON_GPU = torch.cuda.is_available()
CPU = torch.device("cpu")
WORDS = "Test GPU (capability 9.0), Triton 3.6.0, torch 2.11.0"
BOTH = ("triton", "portable")


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_right_kernels_pass(bits):
    assert find_fault(kernels(), CPU, bits) is None


def test_both_dtypes_one_and_many_tokens_groups_and_hashed_codes_are_checked():
    seen = []

    def decode(x, index_map, table, bias=None, *, hash_seed=None):
        seen.append((x.dtype, len(x), table.shape[1], hash_seed is not None, bias is not None))
        return kernels().decode(x, index_map, table, bias, hash_seed=hash_seed)

    assert find_fault(kernels(decode=decode), CPU, 4) is None
    assert seen == [
        (torch.bfloat16, 1, 4, False, False),
        (torch.bfloat16, 17, 4, False, False),
        (torch.float16, 1, 5, True, True),
    ]


@pytest.mark.parametrize(
    ("replaced", "fault"),
    [
        ({"decode": wrong}, "decode of 1 token, 4 bits, bfloat16: relative error 0.0"),
        (
            {"dequantize": lambda m, t, n, **how: reference.dequantize(m, t.flip(2), n, **how)},
            "dequantize, 4 bits, bfloat16: the weights are not the entries of the tables",
        ),
        (
            {"table_grad": lambda g, m, t, **how: torch.full(t.shape, torch.nan)},
            "table_grad, 4 bits, bfloat16: relative error nan, at most 1e-05 is accepted",
        ),
        (
            {"decode": uncompiled},
            "decode of 1 token, 4 bits, bfloat16: RuntimeError: ptxas fatal : unknown instruction",
        ),
    ],
)
def test_a_wrong_kernel_is_named(replaced, fault):
    found = find_fault(kernels(**replaced), CPU, 4)
    assert found.text.startswith(fault)
    assert found.raised == ("Error" in fault)


def test_a_kernel_that_is_wrong_for_hashed_codes_alone_is_named():
    def unseeded(x, index_map, table, bias=None, *, hash_seed=None):
        seed = None if hash_seed is None else hash_seed + 1
        return kernels().decode(x, index_map, table, bias, hash_seed=seed)

    fault = find_fault(kernels(decode=unseeded), CPU, 3)
    assert fault.text.startswith("decode of 1 token, 3 bits, hashed, float16: relative error 1.")


@needs_triton
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("backend", BOTH)
def test_the_real_kernels_pass(backend, bits):
    """In the interpreter, a row takes as long as a thousand on a device."""
    smaller = [Layer(rows=5, columns=512, groups=2, dtype=torch.bfloat16, tokens=(1, 17))]
    device = torch.device("cuda") if ON_GPU else CPU
    layers = LAYERS if ON_GPU else [*smaller, LAYERS[1]]
    assert find_fault(load_decoder(backend), device, bits, layers) is None


@needs_triton
def test_a_wrong_entry_in_a_real_kernel_is_found(monkeypatch):
    """The lookup reads the entry of another code: the smallest fault that a lookup can have."""
    real = load_decoder("portable")

    def other_code(x, index_map, table, bias=None, **how):
        changed = table.clone()
        changed[..., 3] = table[..., 4]
        return real.decode(x, index_map, changed, bias, **how)

    device = torch.device("cuda") if ON_GPU else CPU
    planted = SimpleNamespace(
        can_decode=real.can_decode,
        decode=other_code,
        dequantize=real.dequantize,
        table_grad=real.table_grad,
    )
    fault = find_fault(planted, device, 4, LAYERS[1:])
    assert fault.text.startswith("decode of 1 token, 4 bits, hashed, float16: relative error 0.")


@needs_triton
@pytest.mark.skipif(ON_GPU, reason="launches nothing, so it needs no GPU")
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kernels_compiled_for_the_check_serve_real_layers(bits):
    """Triton compiles once for constants and for what it specialises: dtypes, ones, multiples of
    16. So most of the time of a check is not lost."""
    from helpers.compiled import recorded
    from spallm_kernels.triton import decode, linear

    def launches(rows, columns, groups):
        index_map = torch.empty(rows, columns * bits // 8, dtype=torch.uint8)
        table = torch.empty(rows, groups, 1 << bits, dtype=torch.bfloat16)
        for tokens in (1, 17):
            x = torch.empty(tokens, columns, dtype=torch.bfloat16)
            linear.decode(x, index_map, table)
        linear.dequantize(index_map, table, columns)
        weight_grad = torch.empty(rows, columns, dtype=torch.bfloat16)
        linear.table_grad(weight_grad, index_map, table)
        made = [(launch.arguments, launch.options) for launch in (*decoding, *others)]
        decoding.clear()
        others.clear()
        return [([special(a) for a in arguments], options) for arguments, options in made]

    def special(value):
        if isinstance(value, int):
            return value == 1, value % 16 == 0
        return value if value is None else value.dtype

    names = ("dequantize_units_kernel", "table_grad_kernel")
    with recorded(decode, "decode_kernel") as decoding, recorded(linear, *names) as others:
        first = LAYERS[0]
        ours = launches(first.rows, first.columns, first.groups)
        assert len(ours) == 4
        assert launches(4096, 4096, 4) == launches(14336, 4096, 4) == ours


@needs_triton
@pytest.mark.skipif(ON_GPU, reason="needs a machine without a GPU")
def test_a_device_that_triton_cannot_use_gets_the_reference(tmp_path):
    """The real kernels, compiled and not interpreted, with no driver to run them."""
    script = """
import torch
from spallm_kernels import fallback
from spallm_kernels.dispatch import load_decoder
fallback.describe_device = lambda device: "no GPU"
print(fallback.first_passing(torch.device("cpu"), 4, ("triton", "portable"), load_decoder))
"""
    environment = os.environ | {"TRITON_INTERPRET": "0", "XDG_CACHE_HOME": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert process.stdout == "reference\n"
    assert "failed their check on no GPU: 'triton' failed in dequantize, 4 bits" in process.stderr
    assert "'portable' failed in dequantize, 4 bits" in process.stderr
    assert "0 active drivers" in process.stderr
