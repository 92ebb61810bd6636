"""The column kernels of calibration match the loops in torch.

They run in Triton's interpreter, or on a GPU if there is one.
"""

import pytest
import torch

import spallm_kernels
from helpers.exact_layers import exact_layer
from helpers.hessians import correlated_hessian, sorted_tables, weight_rows
from helpers.triton_needed import needs_triton
from spallm_kernels import batched
from spallm_kernels.dispatch import choose_column_backend

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# With a device, these tests run on it; without one, `conftest.py` has chosen the interpreter.
pytestmark = [needs_triton, *([pytest.mark.gpu] if ON_GPU else [])]

#: rows, columns, groups, entries, columns of a block.
SHAPES = {
    "whole blocks": (5, 24, 1, 4, 8),
    "groups across blocks": (3, 40, 4, 8, 16),
    "part of a block": (1, 30, 2, 16, 64),
    "no powers of two": (4, 21, 3, 5, 12),
    "a group per column": (3, 20, 20, 2, 8),
    "blocks of one column": (3, 9, 3, 4, 1),
}


def by_both(step, *operands, block):
    """Codes from the kernel and from the loop in torch."""
    codes = [step(*operands, block=block, backend=name) for name in ("triton", "torch")]
    assert [found.dtype for found in codes] == [torch.uint8] * 2
    return codes


@pytest.mark.parametrize("shape", SHAPES)
def test_compensate_is_the_same_where_nothing_is_rounded(shape):
    *sizes, block = SHAPES[shape]
    (weights, table, start), hessian = exact_layer(*sizes, device=DEVICE)
    ours, theirs = by_both(batched.compensate, weights, table, hessian, block=block)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, start), "compensation must have changed a code"


@pytest.mark.parametrize("shape", SHAPES)
def test_descend_is_the_same_where_nothing_is_rounded(shape):
    *sizes, block = SHAPES[shape]
    (weights, table, start), hessian = exact_layer(*sizes, device=DEVICE)
    ours, theirs = by_both(batched.descend, weights, table, start, hessian, 2, block=block)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, start), "descent must have changed a code"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_correlated_and_dead_columns(bits):
    rows, n, groups = 5, 40, 2
    arrays = [weight_rows(rows, n, seed=bits)]
    arrays.append(sorted_tables(arrays[0], groups, 2**bits, seed=bits))
    arrays.append(spallm_kernels.assign(*arrays))
    weights, table, start = (torch.from_numpy(array).to(DEVICE) for array in arrays)
    inputs = torch.from_numpy(correlated_hessian(n, bits, dead=(1, 17, 18)))
    hessian = batched.prepare_hessian(inputs.to(DEVICE), 0.01)
    for step, *operands in (
        (batched.compensate, weights, table, hessian),
        (batched.descend, weights, table, start, hessian, 1),
    ):
        ours, theirs = by_both(step, *operands, block=16)
        # If only one of the two fuses its multiply-adds, sums differ in the last bit. Then codes of
        # weights close to a middle differ too: at most one of the 200.
        assert (ours != theirs).sum() <= 1


def test_transposed_operands():
    (weights, table, start), hessian = exact_layer(3, 20, 2, 4, device=DEVICE)
    turned = [tensor.mT.contiguous().mT for tensor in (weights, table, start)]
    assert not any(tensor.is_contiguous() for tensor in turned)
    for step, operands, expected in (
        (batched.compensate, (*turned[:2], hessian), (weights, table, hessian)),
        (batched.descend, (*turned, hessian, 1), (weights, table, start, hessian, 1)),
    ):
        found = step(*operands, backend="triton")
        assert torch.equal(found, step(*expected, backend="torch"))


def test_no_change_ends_a_descent():
    (weights, table, _), hessian = exact_layer(3, 16, 2, 4, device=DEVICE)
    settled = batched.descend(
        weights, table, torch.zeros_like(weights, dtype=torch.uint8), hessian, 50, backend="torch"
    )
    again = batched.descend(weights, table, settled, hessian, 50, backend="triton")
    assert torch.equal(again, settled)


def test_the_loops_in_torch_serve_all_but_gpus():
    assert choose_column_backend(torch.device("cpu"), 16) == "torch"
    assert choose_column_backend(torch.device("meta"), 16) == "torch"
    assert choose_column_backend(DEVICE, 16, "torch") == "torch"
    assert choose_column_backend(DEVICE, 16, "triton") == "triton"


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_kernels_serve_a_gpu_by_default():
    assert choose_column_backend(DEVICE, 16) == "triton"
    assert choose_column_backend(DEVICE, 17) == "torch"


@pytest.mark.parametrize(
    ("entries", "backend", "message"),
    [
        (16, "cpu", "backend must be one of \\['torch', 'triton'\\], found 'cpu'"),
        (17, "triton", "support up to 4 bits, found 5"),
    ],
)
def test_unusable_backends_are_refused(entries, backend, message):
    with pytest.raises(ValueError, match=message):
        choose_column_backend(DEVICE, entries, backend)
