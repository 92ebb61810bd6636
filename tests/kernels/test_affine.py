"""The product of tokens with affine sets, compared with explicit tables."""

import pytest
import torch

from helpers.sketches import TOLERANCE, random, random_sketch, relative_error
from spallm_kernels import lut_linear, lut_linear_affine

SETS = torch.tensor([2, -1, 0, 0, 1, -1, 2])
SLOTS, TOKENS = 3, len(SETS)


def affine(sketch, dtype=torch.float64):
    """Return shifts and scales of some sets."""
    size = (SLOTS, *sketch.table.shape[:2])
    shift = 0.5 * random(*size, dtype=dtype, seed=3)
    return shift, (1 + 0.3 * random(*size, seed=4)).to(dtype).double()


def explicit(x, sketch, shift, scale, bias=0):
    """Return the results by the dense weight of each token's own tables."""
    rows = []
    for token, slot in zip(x, SETS.tolist(), strict=True):
        table = sketch.table
        if slot >= 0:
            table = shift[slot][..., None] + scale[slot][..., None] * table
        rows.append(sketch.dense(table) @ token + bias)
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("hash_seed", [None, 5])
@pytest.mark.parametrize("groups", [1, 2, 3, 8])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_token_has_the_tables_of_its_set(bits, groups, hash_seed, backend):
    """48 columns: with 8 groups of 2 or 3 bits, codes of a group begin inside a byte."""
    for dtype in TOLERANCE:
        sketch = random_sketch(bits, groups, dtype=dtype, hash_seed=hash_seed)
        shift, scale = affine(sketch, dtype)
        x, bias = random(TOKENS, 48, dtype=dtype), random(9, dtype=dtype, seed=1)
        y = lut_linear_affine(
            x.to(dtype),
            sketch.index_map,
            sketch.table.to(dtype),
            shift.to(dtype),
            scale.to(dtype),
            SETS,
            bias.to(dtype),
            hash_seed=hash_seed,
            backend=backend,
        )
        assert y.dtype == dtype
        assert relative_error(y, explicit(x, sketch, shift, scale, bias)) < TOLERANCE[dtype]


def call(sketch, x, sets, shift=None, scale=None, **options):
    found = affine(sketch, torch.float32)
    shift, scale = (g if o is None else o for g, o in zip(found, (shift, scale), strict=True))
    return lut_linear_affine(
        x, sketch.index_map, sketch.table.float(), shift, scale, sets, **options
    )


def test_tokens_of_the_base_are_the_product_itself():
    sketch, x = random_sketch(4, 1), random(TOKENS, 48).float()
    expected = lut_linear(x, sketch.index_map, sketch.table.float())
    assert torch.equal(call(sketch, x, torch.full((TOKENS,), -1)), expected)
    nothing = torch.zeros(0, 9, 1)
    assert torch.equal(call(sketch, x, SETS * 0 - 1, nothing, nothing), expected)
    anything = torch.full((1, 9, 1), torch.nan)
    assert torch.equal(call(sketch, x, SETS * 0 - 1, anything, anything), expected)


def test_leading_dimensions_and_narrow_integers():
    sketch, x = random_sketch(3, 2), random(2, TOKENS, 48).float()
    sets = torch.stack([SETS, SETS.flip(0)])
    y = call(sketch, x, sets.int())
    assert y.shape == (2, TOKENS, 9)
    for rows, tokens, slots in zip(y, x, sets, strict=True):
        torch.testing.assert_close(rows, call(sketch, tokens, slots))
    assert call(sketch, x[:, :0], sets[:, :0]).shape == (2, 0, 9)


def test_autocast_decides_the_dtype():
    sketch, x = random_sketch(4, 2), random(TOKENS, 48, dtype=torch.bfloat16)
    expected = call(sketch, x.bfloat16(), SETS)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(sketch, x.float(), SETS)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_compiled_to_one_graph(groups):
    sketch, x = random_sketch(4, groups), random(TOKENS, 48).float()
    shift, scale = affine(sketch, torch.float32)
    inputs = (x, sketch.index_map, sketch.table.float(), shift.float(), scale.float(), SETS)
    compiled = torch.compile(lut_linear_affine, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), lut_linear_affine(*inputs))


def test_arguments_are_checked():
    sketch, x = random_sketch(4, 2), random(TOKENS, 48).float()
    with pytest.raises(TypeError, match=r"sets must be int64 or int32, found torch\.float32"):
        call(sketch, x, SETS.float())
    with pytest.raises(TypeError, match=r"x must be floating point, found torch\.int64"):
        call(sketch, x.long(), SETS)
    with pytest.raises(ValueError, match=r"sets must be \[7\], found \[6\]"):
        call(sketch, x, SETS[:6])
    with pytest.raises(ValueError, match=r"shift must be \[slots, 9, 2\], .* found \[3, 9, 1\]"):
        call(sketch, x, SETS, torch.zeros(3, 9, 1))
    with pytest.raises(ValueError, match=r"scale must be \[slots, 9, 2\], .* found \[2, 9, 2\]"):
        call(sketch, x, SETS, scale=torch.ones(2, 9, 2))
    with pytest.raises(IndexError):
        call(sketch, x, SETS + 1)
