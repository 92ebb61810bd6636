"""The lookup of rows of a sketch equals an embedding with the dense weight, on all backends."""

import pytest
import torch

from helpers.sketches import TOLERANCE, random, random_sketch
from spallm_kernels import lut_embedding

BACKENDS = ["reference", "cpu"]
IDS = torch.tensor([[3, 0, 3], [8, 3, 1]])  # repeated, so gradients add up


def passes(function, table, y_grad):
    table = table.clone().requires_grad_()
    y = function(table)
    y.backward(y_grad)
    return y.detach(), table.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hash_seed", [None, 5, 2**32 - 5])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rows_and_gradients_equal_those_of_the_dense_weight(bits, groups, hash_seed, backend):
    sketch = random_sketch(bits, groups, hash_seed=hash_seed)
    y_grad = random(2, 3, 48)
    rows, grad = passes(
        lambda table: lut_embedding(
            IDS, sketch.index_map, table, 48, hash_seed=hash_seed, backend=backend
        ),
        sketch.table,
        y_grad,
    )
    dense, dense_grad = passes(
        lambda table: torch.nn.functional.embedding(IDS, sketch.dense(table)), sketch.table, y_grad
    )
    assert torch.equal(rows, dense)
    torch.testing.assert_close(grad, dense_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hash_seed", [None, 5])
def test_rows_have_the_dtype_of_the_table(hash_seed):
    for dtype in TOLERANCE:
        sketch = random_sketch(3, 2, columns=46, dtype=dtype, hash_seed=hash_seed)
        table = sketch.table.to(dtype)
        rows = lut_embedding(IDS.int(), sketch.index_map, table, 46, hash_seed=hash_seed)
        assert rows.dtype == dtype
        assert torch.equal(rows, sketch.dense(table)[IDS])


@pytest.mark.parametrize("hash_seed", [None, 5])
def test_no_ids_give_no_rows_and_no_gradient(hash_seed):
    sketch = random_sketch(4, 2, hash_seed=hash_seed)
    table = sketch.table.requires_grad_()
    none = torch.empty(0, 3, dtype=torch.int64)
    rows = lut_embedding(none, sketch.index_map, table, 48, hash_seed=hash_seed)
    assert rows.shape == (0, 3, 48)
    rows.sum().backward()
    assert table.grad.abs().sum() == 0


@pytest.mark.parametrize("hash_seed", [None, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_keep_torchs_rules(backend, hash_seed):
    sketch = random_sketch(4, 2, hash_seed=hash_seed)
    table, how = sketch.table.float().requires_grad_(), (hash_seed, backend)
    operator = torch.ops.spallm
    for ids in (IDS, IDS[0], IDS[0, 0]):
        torch.library.opcheck(
            operator.lut_embedding.default, (ids, sketch.index_map, table, 48, *how)
        )
    arguments = (torch.randn(2, 3, 48), IDS, sketch.index_map, table.detach(), *how)
    torch.library.opcheck(operator.embedding_table_grad.default, arguments)


def test_compiles_as_one_graph():
    sketch = random_sketch(4, 2)

    def layer(table):
        return lut_embedding(IDS, sketch.index_map, table, 48) * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y_grad = random(2, 3, 48)
    for ours, theirs in zip(
        passes(compiled, sketch.table, y_grad), passes(layer, sketch.table, y_grad), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_low_precision_tables_are_summed_in_float32():
    """1000 tokens with gradient 1/256 in one bf16 entry: bf16 sums would stall at 1."""
    table = torch.zeros(2, 1, 2, dtype=torch.bfloat16, requires_grad=True)
    index_map = torch.zeros(2, 16, dtype=torch.uint8)
    rows = lut_embedding(torch.ones(1000, dtype=torch.int64), index_map, table, 1)
    (rows / 256).sum().backward()
    assert table.grad[1, 0, 0].item() == pytest.approx(1000 / 256, rel=1e-2)


def test_only_the_gathered_rows_are_decoded(monkeypatch):
    """Whatever the size of the vocabulary, the backend sees as many rows as there are ids."""
    from spallm_kernels.cpu import linear as cpu

    seen = []
    original = cpu.dequantize

    def spy(index_map, table, in_features, **options):
        seen.append((len(index_map), len(table)))
        return original(index_map, table, in_features, **options)

    monkeypatch.setattr(cpu, "dequantize", spy)
    sketch = random_sketch(4, 1, rows=500)
    lut_embedding(IDS, sketch.index_map, sketch.table, 48)
    assert seen == [(6, 6)]


def test_bad_ids_and_shapes_are_refused():
    sketch = random_sketch(4, 2)
    with pytest.raises(TypeError, match=r"int64 or int32, found torch.float32"):
        lut_embedding(torch.ones(2), sketch.index_map, sketch.table, 48)
    for number in (-1, 9):
        with pytest.raises(IndexError):
            lut_embedding(torch.tensor([number]), sketch.index_map, sketch.table, 48)
    with pytest.raises(ValueError, match="index_map must be"):
        lut_embedding(IDS, sketch.index_map, sketch.table, 4096)
