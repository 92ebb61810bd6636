"""The Triton kernel of sets of tables matches float64, in Triton's interpreter or on a GPU."""

import pytest
import torch

from helpers.sketches import TOLERANCE, random, relative_error
from helpers.tenants import SETS, random_tenants
from helpers.triton_needed import NO_TRITON
from spallm_kernels import lut_linear_sets

triton = pytest.importorskip("triton", reason=NO_TRITON)
from spallm_kernels.triton import set_blocks, tiles  # noqa: E402
from spallm_kernels.triton import tenants as triton_tenants  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# With a device, these tests run on it; without one, `conftest.py` has chosen the interpreter.
pytestmark = [pytest.mark.gpu] if ON_GPU else []


def products(made, x, sets, dtype, bias=None, **how):
    return lut_linear_sets(
        x.to(DEVICE, dtype),
        made.sketch.index_map.to(DEVICE),
        made.sketch.table.to(DEVICE, torch.float32),
        made.tables.to(DEVICE, torch.float32),
        torch.tensor(sets, device=DEVICE),
        None if bias is None else bias.to(DEVICE, dtype),
        hash_seed=made.sketch.hash_seed,
        **how,
    )


@pytest.fixture
def decoded(monkeypatch):
    """Return a list of the number of tokens of each call of the kernel."""
    calls, original = [], triton_tenants.decode
    monkeypatch.setattr(
        triton_tenants, "decode", lambda *a, **k: calls.append(len(a[0])) or original(*a, **k)
    )
    return calls


@pytest.fixture(params=["look up", "sum by entry"])
def way(request, monkeypatch):
    """Every product in one of the two ways, whatever sets the tokens have."""
    most = {"look up": 1 << 20, "sum by entry": 0}[request.param]
    monkeypatch.setattr(triton_tenants, "most_set_blocks", lambda bits, tokens: most)
    return request.param


@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize(
    ("bits", "dtype", "rows", "columns", "groups", "hash_seed"),
    [
        (4, torch.bfloat16, 16, 256, 1, None),
        (3, torch.float16, 19, 96, 3, None),
        (2, torch.float16, 19, 64, 1, 2**32 - 5),
    ],
)
def test_decoding(way, decoded, bits, dtype, rows, columns, groups, hash_seed, sets):
    numbers = SETS[sets]
    made = random_tenants(bits, groups, rows, columns, dtype=dtype, hash_seed=hash_seed)
    x, bias = random(len(numbers), columns, dtype=dtype), random(rows, dtype=dtype, seed=1)
    y = products(made, x, numbers, dtype, bias, backend="triton")
    assert y.dtype == dtype
    assert relative_error(y, made.products(x, numbers, bias)) < TOLERANCE[dtype]
    assert decoded == [len(numbers)]


def test_several_blocks_of_a_set(way, decoded):
    numbers = [0, 2] * 15 + [0] * 40
    made = random_tenants(4, 1, 17, 64, dtype=torch.float16, slots=9)
    x = random(len(numbers), 64, dtype=torch.float16)
    y = products(made, x, numbers, torch.float16, backend="triton")
    assert relative_error(y, made.products(x, numbers)) < TOLERANCE[torch.float16]
    assert decoded == [70]


def test_without_assembly():
    made, numbers = random_tenants(3, 2, 19, 64, dtype=torch.float16), SETS["uneven"]
    x = random(len(numbers), 64, dtype=torch.float16)
    y = products(made, x, numbers, torch.float16, backend="portable")
    assert relative_error(y, made.products(x, numbers)) < TOLERANCE[torch.float16]


def test_of_more_tokens_only_sets_with_few_are_decoded(decoded, monkeypatch):
    monkeypatch.setattr(triton_tenants, "GRAPH_TOKENS", 20)
    numbers = [1] * 70 + [0, -1, 3]
    made = random_tenants(4, 1, 9, 64, dtype=torch.float16)
    x = random(len(numbers), 64, dtype=torch.float16)
    y = products(made, x, numbers, torch.float16, backend="triton")
    assert relative_error(y, made.products(x, numbers)) < TOLERANCE[torch.float16]
    assert decoded == [3]


def test_dtypes_that_the_tensor_cores_do_not_take(decoded):
    made, numbers = random_tenants(4, 2, 9, 64, dtype=torch.float32), SETS["uneven"]
    x = random(len(numbers), 64, dtype=torch.float32)
    y = products(made, x, numbers, torch.float32, backend="triton")
    assert relative_error(y, made.products(x, numbers)) < TOLERANCE[torch.float32]
    assert decoded == []


@pytest.mark.parametrize("most", [3, 4])
def test_the_number_of_sets_decides(monkeypatch, most):
    """Four sets: with at most three to look up, only the sums are computed, and otherwise none."""
    calls, original = [], triton_tenants.launch_sums
    monkeypatch.setattr(triton_tenants, "most_set_blocks", lambda bits, tokens: most)

    def launch_sums(*operands, y, **options):
        y.fill_(torch.nan)  # what was looked up
        original(*operands, y=y, **options)
        calls.append(y.isnan().all().item())

    monkeypatch.setattr(triton_tenants, "launch_sums", launch_sums)
    made, numbers = random_tenants(4, 1, 9, 64, dtype=torch.float16), [-1, 3, 0, 2, 3]
    x = random(len(numbers), 64, dtype=torch.float16)
    y = products(made, x, numbers, torch.float16, backend="triton")
    assert calls == [most == 4]
    if most == 3:
        assert relative_error(y, made.products(x, numbers)) < TOLERANCE[torch.float16]


def test_more_tokens_than_a_program_sums(way):
    numbers = [number % 5 - 1 for number in range(70)]
    made = random_tenants(3, 1, 11, 96, dtype=torch.float16)
    x = random(len(numbers), 96, dtype=torch.float16)
    y = products(made, x, numbers, torch.float16, backend="triton")
    assert relative_error(y, made.products(x, numbers)) < TOLERANCE[torch.float16]


def test_slots_that_no_token_names_may_hold_anything(way):
    made = random_tenants(4, 1, 9, 64, dtype=torch.float16)
    made.tables[1] = made.sketch.table[:] = torch.nan
    x = random(3, 64, dtype=torch.float16)
    y = products(made, x, [0, 3, 0], torch.float16, backend="triton")
    assert relative_error(y, made.products(x, [0, 3, 0])) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
@pytest.mark.parametrize(("tokens", "slots"), [(1, 1), (7, 100), (150, 3), (150, 0)])
def test_tokens_are_sorted_by_set(tokens, slots, kind, monkeypatch):
    """By comparing them all in one launch, and by torch."""
    generator = torch.Generator().manual_seed(tokens)
    sets = torch.randint(-1, slots, (tokens,), generator=generator, dtype=kind).to(DEVICE)
    expected = torch.argsort(sets, stable=True)
    counts = torch.bincount(sets + 1, minlength=slots + 1)
    for most in (set_blocks.MOST_COMPARED, 0):
        monkeypatch.setattr(set_blocks, "MOST_COMPARED", most)
        order, offsets = set_blocks.sort_tokens(sets, slots)
        assert torch.equal(order.long(), expected)
        assert offsets[0] == 0
        assert torch.equal(offsets.diff().long(), counts)


def test_a_set_that_does_not_exist_harms_no_other(way):
    """Values are not checked on a GPU. Only the token's own product is undefined."""
    made, x = random_tenants(4, 1, 9, 64, dtype=torch.float16), random(3, 64, dtype=torch.float16)
    given = (
        made.sketch.index_map.to(DEVICE),
        made.sketch.table.to(DEVICE, torch.float16),
        made.tables.to(DEVICE, torch.float16),
    )
    sets = torch.tensor([1, 9, -1], device=DEVICE)
    y = triton_tenants.decode(x.to(DEVICE, torch.float16), sets, *given)
    found, expected = y[[0, 2]], made.products(x[[0, 2]], [1, -1])
    assert relative_error(found, expected) < TOLERANCE[torch.float16]


def test_tokens_of_a_block():
    assert tiles.set_block_tokens(1, 65, 64) == 1
    assert tiles.set_block_tokens(5, 65, 64) == 8
    assert tiles.set_block_tokens(40, 65, 64) == 16
    assert tiles.set_block_tokens(512, 9, 64) == 64
    assert tiles.set_block_tokens(512, 9, tiles.PORTABLE_DECODE_TOKENS) == 16
