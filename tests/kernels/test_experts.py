"""Products with the experts of tokens match float64, on CPU backends; the operators' rules."""

import functools

import pytest
import torch

from helpers.experts import random_experts
from helpers.sketches import TOLERANCE, random, relative_error
from spallm_kernels import lut_experts, operators
from spallm_kernels.cpu import experts as cpu_experts
from spallm_kernels.cpu import vector_units

BACKENDS = ["reference", "cpu"]
#: Tokens of each expert: some without, one after another, and all of one.
COUNTS = {"uneven": [3, 0, 1, 0, 7, 2], "first": [5, 0, 0], "last": [0, 0, 1], "each": [1, 1, 1]}


def passes(function, x, table, y_grad):
    x, table = x.clone().requires_grad_(), table.clone().requires_grad_()
    y = function(x, table)
    y.backward(y_grad)
    return y.detach(), x.grad, table.grad


def check(counts, bits, groups, rows, columns, dtype, hash_seed, **how):
    """Compare both passes with plain indexing in float64; tables are float32 or wider."""
    sketch = random_experts(bits, groups, counts, rows, columns, dtype=dtype, hash_seed=hash_seed)
    tokens = sum(counts)
    inputs = (random(tokens, columns, dtype=dtype), sketch.table, random(tokens, rows, dtype=dtype))
    expected = passes(sketch.products, *inputs)
    wide = torch.promote_types(dtype, torch.float32)
    found = passes(
        lambda x, table: lut_experts(
            x, sketch.offsets, sketch.index_map, table, hash_seed=hash_seed, **how
        ),
        *(tensor.to(kind) for tensor, kind in zip(inputs, (dtype, wide, dtype), strict=True)),
    )
    assert [tensor.dtype for tensor in found] == [dtype, dtype, wide]
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < TOLERANCE[dtype]
    unused = torch.tensor(counts) == 0
    assert not found[2][unused].any()


# Not all pairs: each makes two kernels, and a kernel compiles for seconds.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hash_seed", [None, 5])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        (2, torch.float32),
        (3, torch.float32),
        (4, torch.float32),
        (4, torch.float16),
        (3, torch.bfloat16),
        (3, torch.float64),
        (4, torch.float64),
    ],
)
def test_products_and_gradients(bits, dtype, groups, hash_seed, backend):
    check(COUNTS["uneven"], bits, groups, 21, 96, dtype, hash_seed, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hash_seed", [None, 5])
@pytest.mark.parametrize("shape", [(5, 37, 1), (16, 128, 2), (9, 48, 8), (1, 16, 1)])
@pytest.mark.parametrize("counts", COUNTS)
def test_shapes(counts, shape, hash_seed, backend):
    rows, columns, groups = shape
    check(COUNTS[counts], 4, groups, rows, columns, torch.float32, hash_seed, backend=backend)


@pytest.mark.parametrize("bits", [1, 8])
def test_bits_without_vector_instructions(bits):
    check(COUNTS["uneven"], bits, 2, 9, 48, torch.float32, None, backend="cpu")


@pytest.mark.parametrize("hash_seed", [None, 5])
def test_portable_loops(monkeypatch, hash_seed):
    monkeypatch.setenv(vector_units.CHOICE, vector_units.PORTABLE)
    vector_units.host_unit.cache_clear()
    try:
        check(COUNTS["uneven"], 4, 2, 9, 128, torch.float32, hash_seed, backend="cpu")
    finally:
        vector_units.host_unit.cache_clear()


def test_blocks_of_rows(monkeypatch):
    """Hashed rows keep their numbers if an expert is processed in several blocks."""
    monkeypatch.setattr(operators, "CPU_ELEMENTS", 4 * 48)
    check(COUNTS["uneven"], 4, 2, 9, 48, torch.float64, 7, backend="cpu")


@pytest.mark.skipif(vector_units.host_unit() is None, reason="needs vector instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_for_all_experts_and_threads(monkeypatch, dtype):
    """In parallel every thread takes a share of the rows; alone, one takes all of them."""
    calls = []
    original = cpu_experts.decode
    monkeypatch.setattr(
        cpu_experts, "decode", lambda *a, **k: calls.append(a[0].shape) or original(*a, **k)
    )
    sketch = random_experts(4, 2, COUNTS["uneven"], 70, 64, dtype=dtype)
    x = random(13, 64, dtype=dtype)
    found = []
    for serial in (0, 1 << 20):
        monkeypatch.setattr(cpu_experts, "SERIAL", serial)
        table = sketch.table.float()  # rounded to the dtype of x
        found.append(lut_experts(x.to(dtype), sketch.offsets, sketch.index_map, table))
    assert calls == [(13, 64)] * 2
    assert torch.equal(*found)
    assert relative_error(found[0], sketch.products(x, sketch.table)) < TOLERANCE[dtype]


def test_many_tokens_of_16_bits_are_left_to_the_library(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("decoded")

    monkeypatch.setattr(cpu_experts, "decode", refuse)
    check([120, 80, 0, 0], 4, 1, 9, 64, torch.bfloat16, None)


def test_experts_without_tokens_add_nothing():
    """Their tables may even be NaN."""
    sketch = random_experts(4, 1, [2, 0, 3], 8, 64, dtype=torch.float32)
    x, table = random(5, 64, dtype=torch.float32), sketch.table.clone()
    table[1] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        y = lut_experts(x.to(dtype), sketch.offsets, sketch.index_map, table.float())
        assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_no_expert(backend, dtype):
    """Their products and gradients are zero, and they add nothing to tables."""
    sketch = random_experts(4, 1, [2, 0, 3], 8, 64, dtype=dtype)
    inputs = random(9, 64, dtype=dtype), sketch.table, random(9, 8, dtype=dtype)
    expected = passes(sketch.products, *inputs)
    found = passes(
        lambda x, table: lut_experts(x, sketch.offsets, sketch.index_map, table, backend=backend),
        *(tensor.to(dtype) for tensor in inputs),
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < TOLERANCE[dtype]
    assert not found[0][5:].any()
    assert not found[1][5:].any()


def test_no_tokens():
    sketch = random_experts(4, 1, [0, 0], 8, 64)
    table = sketch.table.clone().requires_grad_()
    y = lut_experts(torch.empty(0, 64), sketch.offsets, sketch.index_map, table)
    assert y.shape == (0, 8)
    y.sum().backward()
    assert not table.grad.any()


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("hash_seed", [None, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_keep_torchs_rules(backend, hash_seed, index):
    """Schemas, shapes without data, no aliases of inputs, autograd: torch.library.opcheck."""
    sketch = random_experts(4, 2, [2, 0, 3], 6, 32, hash_seed=hash_seed)
    offsets, table = sketch.offsets.to(index), sketch.table.float().requires_grad_()
    x, how = torch.randn(5, 32).requires_grad_(), (hash_seed, backend)
    operator = torch.ops.spallm
    arguments = (x, offsets, sketch.index_map, table, *how)
    torch.library.opcheck(operator.lut_experts.default, arguments)
    x, y_grad, table = x.detach(), torch.randn(5, 6), table.detach()
    arguments = (y_grad, offsets, sketch.index_map, table, 32, *how)
    torch.library.opcheck(operator.experts_input_grad.default, arguments)
    arguments = (y_grad, x, offsets, sketch.index_map, table, *how)
    torch.library.opcheck(operator.experts_table_grad.default, arguments)


def test_compiles_as_one_graph():
    sketch = random_experts(4, 2, [2, 0, 3], 6, 32)
    inputs = (random(5, 32), sketch.table, random(5, 6))

    def layer(x, table):
        return lut_experts(x * 2, sketch.offsets, sketch.index_map, table).relu() + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(passes(compiled, *inputs), passes(layer, *inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_autocast_computes_in_its_dtype():
    sketch = random_experts(4, 1, [2, 3], 8, 64, dtype=torch.bfloat16)
    x = random(5, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = lut_experts(x.float(), sketch.offsets, sketch.index_map, sketch.table.float())
    assert y.dtype == torch.bfloat16
    assert relative_error(y, sketch.products(x, sketch.table)) < TOLERANCE[torch.bfloat16]


def test_second_derivatives_are_refused():
    sketch = random_experts(4, 1, [2, 3], 8, 64)
    x = random(5, 64).requires_grad_()
    y = lut_experts(x, sketch.offsets, sketch.index_map, sketch.table)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives of a sketched product"):
        gradient.sum().backward()


def test_what_does_not_belong_together_is_refused():
    sketch = random_experts(4, 1, [2, 3], 8, 64)
    call = functools.partial(lut_experts, index_map=sketch.index_map, table=sketch.table)
    x, offsets = random(5, 64), sketch.offsets
    with pytest.raises(TypeError, match=r"floating point, found torch.int64"):
        call(x.long(), offsets)
    with pytest.raises(TypeError, match=r"int64 or int32, found torch.float32"):
        call(x, offsets.float())
    with pytest.raises(ValueError, match=r"x must be \[tokens, in_features\]"):
        call(x[None], offsets)
    with pytest.raises(ValueError, match=r"index_map must be \[2, 8, at least 64 bytes\]"):
        call(random(5, 128), offsets)
    with pytest.raises(ValueError, match=r"offsets must be \[3\], found \[2\]"):
        call(x, offsets[:2])
    for wrong in ([1, 2, 5], [0, 6, 5], [0, 2, 6]):
        with pytest.raises(ValueError, match="ascend from 0 to at most 5 tokens, found"):
            call(x, torch.tensor(wrong))
