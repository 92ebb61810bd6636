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
