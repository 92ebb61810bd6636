"""The portable Triton kernels: results in the interpreter, code for GPUs that are not present."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.sketches import TOLERANCE, random, random_sketch, relative_error
from helpers.triton_needed import NO_TRITON
from spallm_kernels import dequantize, dispatch, lut_linear

triton = pytest.importorskip("triton", reason=NO_TRITON)
from spallm_kernels.triton import tiles  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HELPERS = Path(__file__).parents[1] / "helpers"
on_a_gpu = pytest.mark.gpu if ON_GPU else lambda test: test

#: Chip, and threads of a warp: data centre (CDNA 3) and desktop (RDNA 3).
AMD = [("gfx942", 64), ("gfx1100", 32)]
NVIDIA = [(80,), (90,)]


@on_a_gpu
@pytest.mark.parametrize("hash_seed", [None, 2**32 - 5])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns", "groups", "tokens"),
    [(32, 512, 2, 1), (19, 480, 5, 16), (17, 96, 1, 3), (9, 180, 4, 2), (9, 64, 2, 40)],
)
def test_products(rows, columns, groups, tokens, dtype, bits, hash_seed):
    """On both paths: groups of 45 columns are not whole units, and 40 tokens are too many."""
    sketch = random_sketch(bits, groups, rows, columns, dtype=dtype, hash_seed=hash_seed)
    index_map, table = sketch.index_map.to(DEVICE), sketch.table.to(DEVICE, dtype)
    x, bias = random(tokens, columns, dtype=dtype), random(rows, dtype=dtype, seed=1)
    given = (x.to(DEVICE, dtype), index_map, table, bias.to(DEVICE, dtype))
    y = lut_linear(*given, hash_seed=hash_seed, backend="portable")
    assert relative_error(y, torch.nn.functional.linear(x, sketch.dense(), bias)) < TOLERANCE[dtype]
    dense = dequantize(index_map, table, columns, hash_seed=hash_seed, backend="portable")
    assert torch.equal(dense.cpu().double(), sketch.dense())


@on_a_gpu
def test_gradients():
    sketch = random_sketch(3, 2, 9, 96, dtype=torch.float32)
    x, y_grad = random(5, 96, dtype=torch.float32), random(5, 9, dtype=torch.float32, seed=1)
    table = sketch.table.to(DEVICE, torch.float32).requires_grad_()
    ours = x.to(DEVICE, torch.float32).requires_grad_()
    y = lut_linear(ours, sketch.index_map.to(DEVICE), table, backend="portable")
    y.backward(y_grad.to(DEVICE, torch.float32))
    exact = sketch.table.clone().requires_grad_()
    (x @ sketch.dense(exact).T).backward(y_grad)
    assert relative_error(table.grad, exact.grad) < TOLERANCE[torch.float32]
    assert relative_error(ours.grad, y_grad @ sketch.dense()) < TOLERANCE[torch.float32]


def test_few_tokens_are_decoded():
    sketch = random_sketch(4, 2, 8, 128)

    def path(tokens, dtype=torch.bfloat16):
        x = torch.empty(tokens, 128, dtype=dtype, device=DEVICE)
        return dispatch.choose_path("portable", x, sketch.table)

    assert path(1) == path(tiles.PORTABLE_DECODE_TOKENS) == "decode"
    assert path(tiles.PORTABLE_DECODE_TOKENS + 1) == path(1, torch.float32) == "dense"


@pytest.fixture(scope="module", params=[*NVIDIA, *AMD], ids=lambda chip: str(chip[0]))
def report(request, tmp_path_factory):
    if request.param in AMD and "amd" not in triton.backends.backends:
        pytest.skip(f"Triton {triton.__version__} has no compiler for AMD GPUs")
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    command = [sys.executable, HELPERS / "portable_report.py", *map(str, request.param)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.slow
@pytest.mark.apart
def test_kernels_compile_without_assembly_spills_or_much_shared_memory(report):
    """AMD GPUs have 64 KiB of shared memory, and several programs should fit in it."""
    assert len(report) == 3 * 8
    assert {name for name, code in report.items() if code["spilled"]} == set()
    assert max(code["shared_bytes"] for code in report.values()) <= 20 << 10
    assert {code["kernel"] for code in report.values()} == {
        "decode_kernel",
        "dequantize_any_kernel",
        "table_grad_kernel",
    }
    for name, code in report.items():
        assert (code["matrix_instructions"] > 0) == name.startswith("decode"), name
        assert not code["assembly"], name
