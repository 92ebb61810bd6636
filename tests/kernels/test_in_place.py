"""Operations in place on the output of a sketched product, or on its input after the product."""

import pytest
import torch

from helpers.sketches import passes, random, random_sketch
from spallm_kernels import lut_linear

SHAPES = {"1-D": (48,), "2-D": (3, 48), "3-D": (2, 5, 48), "4-D": (2, 1, 3, 48), "empty": (0, 48)}
CHANGES = {
    "add": lambda y: y.add_(y.new_ones(y.shape)),
    "relu": lambda y: torch.nn.functional.relu(y, inplace=True),
    "mul": lambda y: y.mul_(3),
}


@pytest.fixture(params=[None, 5], ids=["cluster", "hash"])
def sketch(request):
    return random_sketch(4, 2, hash_seed=request.param)


def layers(sketch, *, bias=True):
    """Return the sketched layer and the dense one, as functions of x, table and bias."""
    return (
        lambda x, table, b: lut_linear(
            x, sketch.index_map, table, b if bias else None, hash_seed=sketch.hash_seed
        ),
        lambda x, table, b: torch.nn.functional.linear(x, sketch.dense(table), b if bias else None),
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_outputs_have_the_gradients_of_the_dense_layer(sketch, change, shape, bias):
    inputs = (random(*shape), sketch.table, random(9, seed=1), random(*shape[:-1], 9, seed=2))

    def changed(layer):
        return passes(lambda *tensors: change(layer(*tensors)) + 0 * tensors[2], *inputs)

    ours, theirs = map(changed, layers(sketch, bias=bias))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("path", ["decode", "dense"])
def test_outputs_are_no_views(sketch, shape, path):
    """Of either path, each of which makes the output in another way."""
    x = torch.randn(shape, requires_grad=True)
    y = lut_linear(x, sketch.index_map, sketch.table.float(), hash_seed=sketch.hash_seed, path=path)
    assert not y._is_view()
    assert y.shape == (*shape[:-1], 9)
    assert y.is_contiguous()
    y += 1


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_compiled(sketch, change):
    inputs = (random(3, 48), sketch.table, random(9, seed=1), random(3, 9, seed=2))
    layer, _ = layers(sketch)

    def changed(*tensors):
        return change(layer(*tensors))

    compiled = torch.compile(changed, fullgraph=True, backend="aot_eager")
    for found, expected in zip(passes(compiled, *inputs), passes(changed, *inputs), strict=True):
        assert torch.equal(found, expected)


def test_under_autocast(sketch):
    inputs = [random(2, 3, 48).float(), sketch.table.float(), random(9, seed=1).float()]

    def loss(change):
        live = [tensor.clone().requires_grad_() for tensor in inputs]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = change(layers(sketch)[0](*live))
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        return [y.detach(), *(tensor.grad for tensor in live)]

    for found, expected in zip(loss(lambda y: y.mul_(2)), loss(lambda y: y * 2), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("index", [0, 1], ids=["input", "table"])
def test_changing_what_the_backward_pass_needs_is_refused(sketch, index):
    tensors = [random(3, 48), sketch.table.clone(), random(9, seed=1)]
    live = [tensor.requires_grad_() * 1 for tensor in tensors]
    y = layers(sketch)[0](*live)
    live[index].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
