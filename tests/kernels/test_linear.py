"""The sketched product on CPU backends, its operators, and the choice of backend and path."""

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from helpers.sketches import TOLERANCE, passes, random, random_sketch, relative_error
from spallm_formats import pack
from spallm_kernels import choose_backend, dequantize, dispatch, lut_linear, operators
from spallm_kernels.cpu import linear as cpu_linear
from spallm_kernels.cpu import matrix, vectorized
from spallm_kernels.cpu.vector_units import AMX, AVX512

BACKENDS = ["reference", "cpu"]
BITS = [1, 2, 3, 4, 5, 8]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2, 3, 8])
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_looks_up_exactly(bits, groups, backend):
    for dtype in TOLERANCE:
        sketch = random_sketch(bits, groups, dtype=dtype)
        table = sketch.table.to(dtype)
        dense = dequantize(sketch.index_map, table, 48, backend=backend)
        assert dense.dtype == dtype
        assert torch.equal(dense, sketch.dense(table))


@pytest.mark.parametrize("columns", [1, 3, 5, 7, 9, 47])
@pytest.mark.parametrize("bits", BITS)
def test_rows_of_odd_length(bits, columns):
    sketch = random_sketch(bits, 1, columns=columns)
    for backend in BACKENDS:
        dense = dequantize(sketch.index_map, sketch.table, columns, backend=backend)
        assert torch.equal(dense, sketch.dense())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hash_seed", [None, 5])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_forward_and_gradients_equal_the_dense_layers(
    monkeypatch, bits, groups, hash_seed, backend
):
    """Gradients of the tables are those of the dense weight summed per bucket, in float64."""
    monkeypatch.setattr(operators, "CPU_ELEMENTS", 4 * 48)  # several blocks, the last partial
    sketch = random_sketch(bits, groups, hash_seed=hash_seed)
    inputs = (random(2, 5, 48), sketch.table, random(9, seed=1), random(2, 5, 9, seed=2))
    found = passes(
        lambda x, table, bias: lut_linear(
            x, sketch.index_map, table, bias, hash_seed=hash_seed, backend=backend
        ),
        *inputs,
    )
    expected = passes(
        lambda x, table, bias: torch.nn.functional.linear(x, sketch.dense(table), bias), *inputs
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", [48, 512])
def test_the_default_dtype_of_torch_does_not_count(columns):
    sketch = random_sketch(4, 2, rows=16, columns=columns)
    inputs = (random(5, columns), sketch.table, random(16), random(5, 16))
    singles = [tensor.float() for tensor in inputs]

    def layer(x, table, bias):
        return lut_linear(x, sketch.index_map, table, bias)

    expected = passes(layer, *singles)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = passes(layer, *singles)
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("hash_seed", [None, 5])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_training_steps_equal_those_through_plain_indexing(bits, groups, hash_seed):
    sketch = random_sketch(bits, groups, hash_seed=hash_seed)
    x, target = random(7, 48), random(7, 9, seed=1)
    ours, plain = (sketch.table.clone().requires_grad_() for _ in range(2))
    for table, product in (
        (ours, lambda: lut_linear(x, sketch.index_map, ours, hash_seed=hash_seed)),
        (plain, lambda: x @ sketch.dense(plain).T),
    ):
        optimizer = torch.optim.SGD([table], lr=1e-2, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            (product() - target).square().mean().backward()
            optimizer.step()
    assert not torch.equal(ours, sketch.table)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("hash_seed", [None, 5])
def test_decoding_equals_the_dense_path(hash_seed, tokens, table_dtype, dtype):
    sketch = random_sketch(3, 4, columns=72, dtype=dtype, hash_seed=hash_seed)
    x, bias = random(tokens, 72, dtype=dtype), random(9, dtype=dtype)
    expected = torch.nn.functional.linear(x, sketch.dense(sketch.table.to(table_dtype).double()))
    table = sketch.table.to(table_dtype)
    y = lut_linear(
        x.to(dtype), sketch.index_map, table, bias.to(dtype), hash_seed=hash_seed, path="decode"
    )
    assert y.dtype == dtype
    assert relative_error(y, expected + bias) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_are_the_ones_asked_for(monkeypatch, backend):
    ran = []
    original = dispatch.load_backend

    def spy(name):
        ran.append(name)
        return original(name)

    monkeypatch.setattr(operators, "load_backend", spy)
    sketch = random_sketch(4, 1)
    lut_linear(
        torch.ones(1, 48, dtype=torch.float64),
        sketch.index_map,
        sketch.table.requires_grad_(),
        backend=backend,
    ).sum().backward()
    assert set(ran) == {backend}


def test_backend_by_device():
    assert choose_backend(torch.device("cpu")) == "cpu"
    with pytest.raises(ValueError, match="found 'fast'"):
        choose_backend(torch.device("cpu"), backend="fast")
    with pytest.raises(ValueError, match="needs tensors on the CPU"):
        choose_backend(torch.device("cuda"), backend="cpu")


def test_without_the_gpu_kernels_the_reference_serves_and_one_warning_says_why(monkeypatch):
    dispatch._warn_once.cache_clear()
    monkeypatch.setattr(dispatch, "_why_not_triton", lambda *call: "Triton is not there")
    with pytest.warns(RuntimeWarning, match="slow reference code: Triton is not there"):
        assert choose_backend(torch.device("cuda")) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend(torch.device("cuda")) == "reference"
    with pytest.raises(ValueError, match="cannot serve this call: Triton is not there"):
        choose_backend(torch.device("cuda"), backend="triton")


@pytest.mark.parametrize(
    ("device", "bits", "message"),
    [
        ("cuda", 8, "up to 4 bits, found 8"),
        ("mps", 4, "need an NVIDIA or AMD GPU, found 'mps'"),
    ],
)
def test_what_the_gpu_kernels_do_not_take(device, bits, message):
    for backend in ("triton", "portable"):
        assert message in dispatch._why_not_triton(torch.device(device), bits, backend)


def test_missing_triton_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    reason = dispatch._why_not_triton(torch.device("cuda", 7), 4, "portable")
    assert reason == "Triton is not installed: pip install 'spallm-convert[gpu]'"


def test_old_gpus_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = dispatch._why_not_triton(torch.device("cuda", 6), 4, "portable")
    assert reason == "the Triton kernels need compute capability 8.0, found 7.5"


def test_path_by_shape_and_dtype():
    sketch = random_sketch(4, 1)

    def path(tokens, dtype=torch.float32, backend="cpu", **options):
        return dispatch.choose_path(
            backend, torch.ones(tokens, 48, dtype=dtype), sketch.table, **options
        )

    # Tables in float64 are not for vector registers.
    limits = cpu_linear.PORTABLE_TOKENS
    for dtype, most in zip((torch.float32, torch.bfloat16), limits, strict=True):
        assert path(1, dtype) == path(most, dtype) == "decode"
        assert path(most + 1, dtype) == "dense"
    assert path(0) == "dense"
    assert path(65, path="decode") == "decode"
    assert path(1, path="dense") == "dense"
    assert path(1, torch.float64) == "dense"
    assert path(1, backend="reference") == "dense"
    with pytest.raises(ValueError, match=r"cannot decode torch.float64 inputs \[1, 48\]"):
        path(1, torch.float64, path="decode")
    with pytest.raises(ValueError, match=r"one of \['decode', 'dense'\], found 'quick'"):
        path(1, path="quick")


@pytest.mark.parametrize("unit", [AVX512, AMX])
def test_path_in_vector_registers(monkeypatch, unit):
    for module in (cpu_linear, matrix, vectorized):
        monkeypatch.setattr(module, "host_unit", lambda: unit)
    table = random_sketch(4, 1).table.float()

    def path(tokens, dtype, hashed):
        x = torch.ones(1, 48, dtype=dtype).expand(tokens, 48)
        return dispatch.choose_path("cpu", x, table, hashed=hashed)

    stored = cpu_linear.STORED_TOKENS
    if unit is AMX:
        stored = cpu_linear.BESIDE_MATRIX_TOKENS[0], cpu_linear.MATRIX_TOKENS
    assert path(100_000, torch.float32, False) == ("dense" if unit is AMX else "decode")
    for hashed, limits in ((False, stored), (True, cpu_linear.HASHED_TOKENS)):
        for dtype, most in zip((torch.float32, torch.bfloat16), limits, strict=True):
            if most < math.inf:
                assert path(most, dtype, hashed) == "decode"
                assert path(most + 1, dtype, hashed) == "dense"


@pytest.mark.parametrize("hash_seed", [None, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_keep_torchs_rules(backend, hash_seed):
    """Schemas, shapes without data, no aliases of inputs, autograd: torch.library.opcheck."""
    sketch = random_sketch(4, 2, rows=6, columns=32, hash_seed=hash_seed)
    table = sketch.table.float().requires_grad_()
    x, bias = torch.randn(3, 5, 32).requires_grad_(), torch.randn(6).requires_grad_()
    y_grad, how = torch.randn(3, 5, 6), (hash_seed, backend)
    operator = torch.ops.spallm
    for given in (None, bias):
        for rows in (x, torch.randn(32).requires_grad_()):
            arguments = (rows, sketch.index_map, table, given, *how, None)
            torch.library.opcheck(operator.lut_linear.default, arguments)
    plain = table.detach()
    torch.library.opcheck(operator.dequantize.default, (sketch.index_map, plain, 32, *how))
    arguments = (y_grad, sketch.index_map, plain, 32, *how)
    torch.library.opcheck(operator.input_grad.default, arguments)
    arguments = (y_grad, x.detach(), sketch.index_map, plain, *how)
    torch.library.opcheck(operator.table_grad.default, arguments)


def test_compiles_as_one_graph():
    sketch = random_sketch(4, 2, columns=32)
    inputs = (random(3, 32), sketch.table, random(9), random(3, 9))

    def layer(x, table, bias):
        return torch.nn.functional.silu(lut_linear(x, sketch.index_map, table, bias)) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(passes(compiled, *inputs), passes(layer, *inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_second_derivatives_are_refused():
    sketch = random_sketch(4, 2)
    x = random(2, 48).requires_grad_()
    y = lut_linear(x, sketch.index_map, sketch.table.requires_grad_())
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives of a sketched product"):
        gradient.sum().backward()


def test_low_precision_tables_are_summed_in_float32():
    """1000 gradients of 1/256 into one bf16 entry: bf16 sums would stall at 1."""
    index_map = torch.from_numpy(pack(np.zeros((1, 1000), np.uint8), 2))
    table = torch.zeros(1, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    x = torch.full((1, 1000), 1 / 256, dtype=torch.bfloat16)
    lut_linear(x, index_map, table).sum().backward()
    assert table.grad[0, 0, 0].item() == pytest.approx(1000 / 256, rel=1e-2)


def test_nothing_dense_is_kept_between_the_passes():
    sketch = random_sketch(4, 2, rows=64)
    sketch.table.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        lut_linear(torch.ones(3, 48, dtype=torch.float64), sketch.index_map, sketch.table)
    assert saved
    assert max(saved) < 64 * 48


def test_integers_are_refused():
    sketch = random_sketch(4, 2)
    with pytest.raises(TypeError, match=r"must be floating point, found torch.int64"):
        lut_linear(torch.ones(1, 48, dtype=torch.int64), sketch.index_map, sketch.table)
    with pytest.raises(ValueError, match="index_map must be"):
        dequantize(sketch.index_map, sketch.table, 4096)


def test_shapes_that_do_not_belong_together_are_refused():
    sketch = random_sketch(4, 2)
    with pytest.raises(ValueError, match="groups that divide"):
        lut_linear(torch.ones(1, 47, dtype=torch.float64), sketch.index_map, sketch.table)
    with pytest.raises(ValueError, match="index_map must be"):
        lut_linear(torch.ones(1, 480, dtype=torch.float64), sketch.index_map, sketch.table)


def test_importing_queries_no_device_and_no_compiler():
    script = (
        "import sys, spallm_kernels.linear, torch;"
        "assert not torch.cuda.is_initialized();"
        "assert not {'triton', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
