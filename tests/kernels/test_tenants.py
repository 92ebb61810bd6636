"""Products of tokens with their own tables match float64, on CPU backends, and `lut_linear`."""

import functools
from types import SimpleNamespace

import numba
import pytest
import torch

from helpers.sketches import TOLERANCE, random, relative_error
from helpers.tenants import SETS, random_tenants
from spallm_kernels import lut_linear, lut_linear_sets
from spallm_kernels.cpu import tenants as cpu_tenants
from spallm_kernels.cpu import vector_units

BACKENDS = ["reference", "cpu"]
needs_vectors = pytest.mark.skipif(
    vector_units.host_unit() is None, reason="needs vector instructions"
)


def products(made, x, sets, bias=None, *, dtype, table_dtype=None, **how):
    table_dtype = table_dtype or torch.promote_types(dtype, torch.float32)
    return lut_linear_sets(
        x.to(dtype),
        made.sketch.index_map,
        made.sketch.table.to(table_dtype),
        made.tables.to(table_dtype),
        torch.as_tensor(sets),
        None if bias is None else bias.to(dtype),
        hash_seed=made.sketch.hash_seed,
        **how,
    )


def check(sets, bits, groups, rows, columns, dtype, *, hash_seed=None, table_dtype=None, **how):
    made = random_tenants(bits, groups, rows, columns, dtype=dtype, hash_seed=hash_seed)
    x, bias = random(len(sets), columns, dtype=dtype), random(rows, dtype=dtype, seed=1)
    given = {"dtype": dtype, "table_dtype": table_dtype, **how}
    for offset in (None, bias):
        y = products(made, x, sets, offset, **given)
        assert y.dtype == dtype
        assert relative_error(y, made.products(x, sets, offset)) < TOLERANCE[dtype]


def refuse(*args, **kwargs):
    raise AssertionError("decoded")


# Not all pairs: each kind of sketch makes a kernel, and a kernel compiles for seconds.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("bits", "groups", "columns", "dtype", "hash_seed"),
    [
        (4, 1, 37, torch.float32, None),
        (4, 3, 96, torch.float32, None),
        (3, 2, 96, torch.bfloat16, None),
        (4, 3, 96, torch.float32, 5),
        (4, 3, 96, torch.float64, 5),
    ],
)
def test_products(bits, groups, columns, dtype, hash_seed, backend):
    for sets in SETS.values():
        check(sets, bits, groups, 21, columns, dtype, hash_seed=hash_seed, backend=backend)


def test_bits_without_vector_instructions():
    check(SETS["uneven"], 1, 2, 9, 48, torch.float32, backend="cpu")


def test_portable_loops(monkeypatch):
    monkeypatch.setenv(vector_units.CHOICE, vector_units.PORTABLE)
    vector_units.host_unit.cache_clear()
    try:
        check(SETS["uneven"], 4, 2, 9, 128, torch.float32, backend="cpu")
    finally:
        vector_units.host_unit.cache_clear()


def test_tables_in_other_dtypes():
    """Those of inputs, those that are copied, and the base's in another one."""
    for table_dtype in (torch.bfloat16, torch.float64):
        check(SETS["uneven"], 4, 1, 9, 64, torch.bfloat16, table_dtype=table_dtype)
    made, sets = random_tenants(4, 1, 9, 64, dtype=torch.bfloat16), SETS["uneven"]
    x, table = random(len(sets), 64, dtype=torch.float32), made.sketch.table.bfloat16()
    given = x.float(), made.sketch.index_map, table, made.tables.float(), torch.tensor(sets)
    assert relative_error(lut_linear_sets(*given), made.products(x, sets)) < 1e-5


@needs_vectors
def test_a_token_has_the_bits_of_lut_linear_whatever_is_in_the_batch():
    """Also if rows or columns do not fill a tile."""
    for rows, columns in ((22, 100), (22, 64)):
        made = random_tenants(4, 1, rows, columns, slots=5)
        table, tables = made.sketch.table.float(), made.tables.float()
        x, index_map = random(30, columns).float(), made.sketch.index_map
        owns = [table if number < 0 else tables[number] for number in range(-1, 5)]
        alone = torch.stack([lut_linear(x, index_map, own) for own in owns])
        generator = torch.Generator().manual_seed(rows)
        for most in (1, 3, 5):
            for tokens in (2, 3, 6, 30):
                sets = torch.randint(-1, most, (tokens,), generator=generator)
                y = lut_linear_sets(x[:tokens], index_map, table, tables, sets)
                assert torch.equal(y, alone[sets + 1, torch.arange(tokens)])


@needs_vectors
def test_the_same_bits_with_any_number_of_threads(monkeypatch):
    made, sets = random_tenants(4, 1, 70, 100), SETS["uneven"]
    x, found, threads = random(len(sets), 100), [], numba.get_num_threads()
    for serial, count in ((1 << 20, threads), (0, threads), (0, 1)):
        monkeypatch.setattr(cpu_tenants, "SERIAL", serial)
        numba.set_num_threads(count)
        found.append(products(made, x, sets, dtype=torch.float32))
    numba.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("number", [-1, 2])
def test_one_set_is_left_to_lut_linear(monkeypatch, number):
    monkeypatch.setattr(cpu_tenants, "decode", refuse)
    check([number] * 6, 4, 1, 21, 37, torch.float32)


@needs_vectors
def test_only_sets_with_many_tokens_of_16_bits_are_left_to_the_library(monkeypatch):
    calls = []
    original = cpu_tenants.decode
    monkeypatch.setattr(
        cpu_tenants, "decode", lambda *a, **k: calls.append(a[0].shape) or original(*a, **k)
    )
    check([1, 0] * 40 + [2, -1, 2], 3, 2, 21, 96, torch.bfloat16)
    assert calls == [(3, 96)] * 2  # with a bias and without


@needs_vectors
def test_sets_with_several_tokens_are_left_to_tile_registers(monkeypatch):
    calls, original = [], cpu_tenants.decode
    monkeypatch.setattr(
        cpu_tenants, "decode", lambda *a, **k: calls.append(a[1].tolist()) or original(*a, **k)
    )
    monkeypatch.setattr(cpu_tenants, "matrix", SimpleNamespace(supports=lambda *given: True))
    check([1] * 5 + [0] * 4 + [2, -1, 2], 3, 2, 21, 96, torch.bfloat16)
    assert [sorted(sets) for sets in calls] == 2 * [[-1, 0, 0, 0, 0, 2, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slots_that_no_token_names_may_hold_anything(dtype):
    made = random_tenants(4, 1, 21, 37)
    made.tables[1] = torch.nan
    made.sketch.table[:] = torch.nan
    y = products(made, random(4, 37), [0, 2, 3, 0], dtype=dtype)
    assert relative_error(y, made.products(random(4, 37), [0, 2, 3, 0])) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_and_no_slots(backend):
    made = random_tenants(4, 1, 21, 37, slots=0)
    how = {"dtype": torch.float32, "backend": backend}
    empty = torch.empty(0, dtype=torch.int32)
    assert products(made, torch.empty(0, 37), empty, **how).shape == (0, 21)
    y = products(made, random(2, 37), [-1, -1], **how)
    assert relative_error(y, made.products(random(2, 37), [-1, -1])) < 1e-5


def test_layouts():
    """More dimensions, sets of 32 bits, sets that lie apart, tables that do not lie in rows."""
    made, x = random_tenants(4, 1, 21, 37), random(2, 3, 37, seed=3).float()
    sets = torch.tensor([[1, -1, 0], [3, 0, 1]], dtype=torch.int32)
    apart = torch.stack([made.tables.float()] * 2, 1)
    sketch, expected = made.sketch, made.products(x.double().flatten(0, 1), sets.flatten())
    across = apart.transpose(-1, -2).contiguous().transpose(-1, -2)
    for tables in (apart[:, 1], across[:, 0]):
        given = x, sketch.index_map, sketch.table.float(), tables, sets
        y = lut_linear_sets(*given)
        assert y.shape == (2, 3, 21)
        assert relative_error(y.flatten(0, 1), expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_keeps_torchs_rules(backend):
    made = random_tenants(4, 1, 21, 37)
    sketch, x, bias = made.sketch, random(3, 37).float(), random(21).float()
    given = x, sketch.index_map, sketch.table.float(), made.tables.float(), torch.tensor([0, -1, 2])
    torch.library.opcheck(
        torch.ops.spallm.lut_linear_sets.default, (*given, bias, sketch.hash_seed, backend)
    )


def test_compiles_as_one_graph():
    made = random_tenants(4, 1, 21, 37)

    def layer(x, sets):
        return products(made, x * 2, sets, dtype=torch.float32).relu() + 1

    given = random(4, 37).float(), torch.tensor([0, -1, 2, 2])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), layer(*given))


def test_autocast_computes_in_its_dtype():
    made = random_tenants(3, 2, 21, 96, dtype=torch.bfloat16)
    x, sets = random(13, 96, dtype=torch.bfloat16), SETS["uneven"]
    with torch.autocast("cpu", torch.bfloat16):
        y = products(made, x, sets, dtype=torch.float32)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, made.products(x, sets)) < TOLERANCE[torch.bfloat16]


def test_derivatives_are_refused():
    made = random_tenants(4, 1, 21, 37)
    y = products(made, random(2, 37).requires_grad_(), [0, 1], dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="have no derivative; train the tables of one"):
        y.sum().backward()


def test_what_does_not_belong_together_is_refused():
    made = random_tenants(4, 1, 21, 37)
    call = functools.partial(
        lut_linear_sets, index_map=made.sketch.index_map, table=made.sketch.table
    )
    x, tables, sets = random(2, 37), made.tables, torch.tensor([0, 1])
    with pytest.raises(TypeError, match=r"x must be floating point, found torch.int64"):
        call(x.long(), tables=tables, sets=sets)
    with pytest.raises(TypeError, match=r"sets must be int64 or int32, found torch.float32"):
        call(x, tables=tables, sets=sets.float())
    with pytest.raises(ValueError, match=r"index_map must be \[21, at least 40 bytes\]"):
        call(random(2, 80), tables=tables, sets=sets)
    for wrong in (tables[0], tables[:, :20], tables[..., :8]):
        with pytest.raises(ValueError, match=r"tables must be \[slots, 21, 1, 16\], found"):
            call(x, tables=wrong, sets=sets)
    with pytest.raises(ValueError, match=r"sets must be \[2\], found \[1\]"):
        call(x, tables=tables, sets=sets[:1])
    for wrong in ([0, 4], [-2, 0]):
        with pytest.raises(ValueError, match=r"sets must be from -1 to 3, found"):
            call(x, tables=tables, sets=torch.tensor(wrong))
