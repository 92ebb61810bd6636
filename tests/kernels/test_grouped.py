"""Products of several experts at a time match float64, with the grouped product and without."""

import pytest
import torch

from helpers.experts import random_experts
from helpers.sketches import TOLERANCE, random, relative_error
from spallm_kernels import grouped

ROWS, COLUMNS = 16, 64
#: Tokens of each expert, and how many belong to none.
COUNTS = {
    "uneven": ([0, 0, 5, 0, 70, 1, 0, 3, 0], 4),
    "all to one": ([0, 30, 0], 0),
    "one expert": ([9], 2),
    "no token": ([0, 0], 3),
}


@pytest.fixture(params=[True, False], ids=["grouped", "looped"])
def products(request, monkeypatch):
    """On the CPU, torch has a grouped product too, for the dtype that it has on a GPU."""
    calls, original = [], grouped._grouped_mm
    monkeypatch.setattr(
        grouped, "_grouped_mm", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    monkeypatch.setattr(grouped, "_has_kernel", lambda device: request.param)
    return calls


@pytest.mark.parametrize("experts", [1, 2, 100])
@pytest.mark.parametrize("hash_seed", [None, 7])
@pytest.mark.parametrize("counts", COUNTS)
def test_all_passes(products, request, monkeypatch, counts, hash_seed, experts):
    """`experts`: how many fit the budget."""
    monkeypatch.setattr(grouped, "GROUPED_ELEMENTS", experts * ROWS * COLUMNS)
    each, none = COUNTS[counts]
    dtype, options = torch.bfloat16, {"hash_seed": hash_seed, "dtype": torch.bfloat16}
    made = random_experts(3, 2, each, ROWS, COLUMNS, **options)
    tokens = sum(each) + none
    x, y_grad = (random(tokens, size, dtype=dtype, seed=size) for size in (COLUMNS, ROWS))
    exact = [x.clone().requires_grad_(), made.table.clone().requires_grad_()]
    expected = made.products(*exact)
    expected.backward(y_grad)
    x, y_grad, table = x.to(dtype), y_grad.to(dtype), made.table.to(dtype)
    sketch, how = (made.offsets, made.index_map, table), (hash_seed, "reference")
    found = {
        "y": grouped.multiply(x, *sketch, *how),
        "x_grad": grouped.input_grad(y_grad, *sketch, COLUMNS, *how),
        "table_grad": grouped.table_grad(y_grad, x, *sketch, *how),
    }
    wanted = dict(zip(found, (expected.detach(), exact[0].grad, exact[1].grad), strict=True))
    for name, result in found.items():
        assert result.shape == wanted[name].shape
        assert not result[wanted[name] == 0].any(), name
        if wanted[name].any():
            assert relative_error(result, wanted[name]) < TOLERANCE[dtype], name
    assert found["table_grad"].dtype == torch.float32
    assert bool(products) == ("grouped" in request.node.name and sum(each) > 0)


def with_strides(x):
    """The rows of a wider matrix, at an odd address."""
    wide = x.new_zeros(len(x), x.shape[1] + 3)
    wide[:, 1:-2] = x
    return wide[:, 1:-2]


#: Layouts of matrices that a grouped product refuses.
LAYOUTS = {
    "rows apart": with_strides,
    "columns first": lambda x: x.T.contiguous().T,
    "odd address": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("counts", [[0, 5, 0, 7], [0, 1]])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs_and_gradients(products, layout, counts):
    dtype, laid = torch.bfloat16, LAYOUTS[layout]
    made = random_experts(4, 1, counts, ROWS, COLUMNS, dtype=dtype)
    x, y_grad = (random(sum(counts), size, dtype=dtype).to(dtype) for size in (COLUMNS, ROWS))
    sketch, how = (made.offsets, made.index_map, made.table.to(dtype)), (None, "reference")

    def passes(x, y_grad):
        yield grouped.multiply(x, *sketch, *how)
        yield grouped.input_grad(y_grad, *sketch, COLUMNS, *how)
        yield grouped.table_grad(y_grad, x, *sketch, *how)

    for found, expected in zip(passes(laid(x), laid(y_grad)), passes(x, y_grad), strict=True):
        assert torch.equal(found, expected)
    # A CPU takes any address.
    assert grouped._aligned(laid(x)).data_ptr() % 16 == 0


def test_the_gradient_of_a_sum(products):
    """It has strides of zero."""
    made = random_experts(4, 1, [3, 0, 6], ROWS, COLUMNS, dtype=torch.bfloat16)
    y_grad = torch.ones((), dtype=torch.bfloat16).expand(9, ROWS)
    sketch = made.offsets, made.index_map, made.table.bfloat16()
    x = random(9, COLUMNS, dtype=torch.bfloat16)
    found = (
        grouped.input_grad(y_grad, *sketch, COLUMNS, None, "reference"),
        grouped.table_grad(y_grad, x.bfloat16(), *sketch, None, "reference"),
    )
    exact = x.requires_grad_(), made.table.requires_grad_()
    made.products(*exact).sum().backward()
    for ours, theirs in zip(found, exact, strict=True):
        assert relative_error(ours, theirs.grad) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("capability", "hip", "platform", "found"),
    [
        ((9, 0), None, "linux", True),
        ((10, 3), None, "linux", True),
        ((8, 9), None, "linux", False),
        ((12, 0), None, "linux", False),
        ((9, 4), "6.4", "linux", False),
        ((9, 0), None, "win32", False),
    ],
)
def test_devices_with_a_kernel(monkeypatch, capability, hip, platform, found):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(grouped.sys, "platform", platform)
    # Without its cache, which would keep the answers for later tests.
    assert grouped._has_kernel.__wrapped__(torch.device("cuda", 0)) == found
    assert not grouped._has_kernel.__wrapped__(torch.device("cpu"))


@pytest.mark.parametrize(
    ("dtype", "rows", "columns", "grouped_product"),
    [
        (torch.bfloat16, 16, 64, True),
        (torch.float16, 16, 64, False),
        (torch.float32, 16, 64, False),
        (torch.bfloat16, 12, 64, False),
        (torch.bfloat16, 16, 68, False),
    ],
)
def test_what_the_grouped_product_takes(monkeypatch, dtype, rows, columns, grouped_product):
    monkeypatch.setattr(grouped, "_has_kernel", lambda device: True)
    assert grouped._is_grouped(dtype, torch.device("cuda"), rows, columns) == grouped_product


def test_the_budget_bounds_the_experts_of_a_chunk(monkeypatch):
    monkeypatch.setattr(grouped, "GROUPED_ELEMENTS", 3 * 100)
    offsets = torch.tensor([0, 2, 2, 5, 6, 6, 6, 6, 9])
    chunks = list(grouped._chunks(offsets, 100))
    assert [chunk.experts for chunk in chunks] == [slice(0, 3), slice(3, 4), slice(7, 8)]
    assert [chunk.ends.tolist() for chunk in chunks] == [[2, 2, 5], [1], [3]]
    assert [chunk.tokens for chunk in chunks] == [slice(0, 5), slice(5, 6), slice(6, 9)]


def test_a_chunk_has_no_more_experts_than_the_grouped_product_takes():
    chunks = list(grouped._chunks(torch.arange(2050), 1))
    assert [len(chunk.ends) for chunk in chunks] == [1023, 1023, 3]
