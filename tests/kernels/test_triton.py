"""The Triton kernels match float64, in Triton's interpreter, or on a GPU if there is one."""

import os
import subprocess
import sys

import pytest
import torch

from helpers.sketches import TOLERANCE, passes, random, random_sketch, relative_error
from helpers.triton_needed import NO_TRITON
from spallm_kernels import dequantize, dispatch, lut_embedding, lut_linear, operators

triton = pytest.importorskip("triton", reason=NO_TRITON)
tl = triton.language
from spallm_kernels.triton import linear as triton_linear  # noqa: E402
from spallm_kernels.triton import lookup, ptx, tiles  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# With a device, these tests run on it; without one, `conftest.py` has chosen the interpreter.
pytestmark = [pytest.mark.gpu] if ON_GPU else []

HALVES = [torch.float16, torch.bfloat16]
#: rows, columns, groups: whole tiles, ragged rows, ragged steps, an odd number of groups, a row
#: of one unit, groups that are not whole units, rows of bytes that are not whole words.
SHAPES = {
    "even": (32, 512, 2),
    "eight groups": (19, 1024, 8),
    "ragged": (17, 96, 1),
    "five groups": (5, 480, 5),
    "one unit": (3, 32, 1),
    "odd groups": (9, 180, 4),
    "odd columns": (7, 37, 1),
}


def on_device(sketch, dtype):
    return sketch.index_map.to(DEVICE), sketch.table.to(DEVICE, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hash_seed", [None, 2**32 - 5])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_dequantize_looks_up_exactly(bits, hash_seed, shape):
    rows, columns, groups = SHAPES[shape]
    for dtype in (torch.bfloat16, torch.float64):  # looked up in registers, and in memory
        sketch = random_sketch(bits, groups, rows, columns, dtype=dtype, hash_seed=hash_seed)
        index_map, table = on_device(sketch, dtype)
        dense = dequantize(index_map, table, columns, hash_seed=hash_seed, backend="triton")
        assert torch.equal(dense.cpu(), sketch.dense(sketch.table.to(dtype)))


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        ("even", 1),
        ("even", 64),
        ("eight groups", 3),
        ("eight groups", 16),
        ("ragged", 1),
        ("ragged", 20),
        ("five groups", 8),
        ("one unit", 2),
    ],
)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("hash_seed", [None, 7])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_decoding(bits, hash_seed, dtype, shape, tokens):
    rows, columns, groups = SHAPES[shape]
    sketch = random_sketch(bits, groups, rows, columns, dtype=dtype, hash_seed=hash_seed)
    index_map, table = on_device(sketch, torch.float32 if tokens % 2 else dtype)
    x, bias = random(tokens, columns, dtype=dtype), random(rows, dtype=dtype, seed=1)
    expected = torch.nn.functional.linear(x, sketch.dense(), bias)
    ours = (x.to(DEVICE, dtype), index_map, table, bias.to(DEVICE, dtype))
    y = lut_linear(*ours, hash_seed=hash_seed, backend="triton", path="decode")
    assert y.dtype == dtype
    assert relative_error(y, expected) < TOLERANCE[dtype]
    again = lut_linear(*ours, hash_seed=hash_seed, backend="triton", path="decode")
    assert torch.equal(y, again)


@pytest.mark.parametrize("path", ["decode", "dense"])
def test_a_bias_with_gaps(path):
    sketch = random_sketch(4, 1, columns=128, dtype=torch.float16)
    index_map, table = on_device(sketch, torch.float16)
    x, bias = random(1, 128, dtype=torch.float16), random(2 * len(table), dtype=torch.float16)
    y = lut_linear(
        x.to(DEVICE, torch.float16),
        index_map,
        table,
        bias.to(DEVICE, torch.float16)[::2],
        backend="triton",
        path=path,
    )
    expected = torch.nn.functional.linear(x, sketch.dense(), bias[::2])
    assert relative_error(y, expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("shape", ["even", "ragged", "odd groups", "odd columns"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("hash_seed", [None, 7])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_forward_and_gradients(monkeypatch, bits, hash_seed, dtype, shape):
    """Both passes of the op; tables are float32 even if the rest is narrower, as in training."""
    rows, columns, groups = SHAPES[shape]
    monkeypatch.setattr(operators, "GRAD_ELEMENTS", 8 * columns)  # several blocks, the last partial
    sketch = random_sketch(bits, groups, rows, columns, dtype=dtype, hash_seed=hash_seed)
    wide = torch.promote_types(dtype, torch.float32)
    inputs = [
        random(2, 70, columns, dtype=dtype),
        sketch.table,
        random(rows, dtype=dtype, seed=1),
        random(2, 70, rows, dtype=dtype, seed=2),
    ]
    expected = passes(
        lambda x, table, bias: torch.nn.functional.linear(x, sketch.dense(table), bias), *inputs
    )
    kinds = (dtype, wide, dtype, dtype)
    index_map = sketch.index_map.to(DEVICE)
    found = passes(
        lambda x, table, bias: lut_linear(
            x, index_map, table, bias, hash_seed=hash_seed, backend="triton", path="dense"
        ),
        *(tensor.to(DEVICE, kind) for tensor, kind in zip(inputs, kinds, strict=True)),
    )
    assert found[2].dtype == wide
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < TOLERANCE[dtype]


def test_path_by_shape_and_dtype():
    sketch = random_sketch(4, 2, 8, 128)

    def path(
        tokens, dtype=torch.bfloat16, table=sketch.table, columns=128, hashed=False, path=None
    ):
        x = torch.empty(tokens, columns, dtype=dtype, device=DEVICE)
        return dispatch.choose_path("triton", x, table, hashed=hashed, path=path)

    assert path(1) == "decode"
    assert path(tiles.DECODE_TOKENS) == "decode"
    assert path(tiles.DECODE_TOKENS + 1) == "dense"
    assert path(tiles.HASHED_DECODE_TOKENS, hashed=True) == "decode"
    assert path(tiles.HASHED_DECODE_TOKENS + 1, hashed=True) == "dense"
    assert path(1, torch.float32) == "dense"  # the tensor cores take 16-bit operands
    assert path(1, columns=66) == "dense"  # groups of 33 columns are not whole units
    assert path(1, table=torch.empty(8, 2, 2)) == "dense"  # one bit
    for tokens in (0, tiles.DECODE_TOKENS + 1):
        with pytest.raises(ValueError, match=rf"cannot decode torch.bfloat16 inputs \[{tokens},"):
            path(tokens, path="decode")


def test_a_backend_for_16_bit_activations_takes_the_decode_path_by_itself(monkeypatch):
    calls = []
    original = triton_linear.decode
    monkeypatch.setattr(
        triton_linear, "decode", lambda *a, **k: calls.append(a[0].shape) or original(*a, **k)
    )
    sketch = random_sketch(4, 1, 8, 64)
    index_map, table = on_device(sketch, torch.float16)
    for tokens in (1, 65):
        x = torch.ones(tokens, 64, dtype=torch.float16, device=DEVICE)
        lut_linear(x, index_map, table, backend="triton")
    assert calls == [(1, 64)]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 32, 64])
def test_tiles_fit_the_layer(tokens, bits):
    """Shares of the columns start at units, never straddle groups, and cover a row once."""
    for columns, groups in [(4096, 4), (14336, 4), (11008, 2), (576, 1), (1536, 8), (96, 3)]:
        width = columns // groups
        for generation in (8, 9, 12):
            tile = tiles.decode_tile(bits, tokens, columns, width, generation)
            span = tiles.table_span(columns, width, tile.slots)
            share = columns // tile.slots
            assert share * tile.slots == columns
            assert share % span == 0
            assert span % tiles.ALIGNMENT == 0
            assert all(
                start // width == (start + span - 1) // width for start in range(0, columns, span)
            )
            assert tile.tokens >= tokens
            unit = ptx.UNIT_CODES[bits] * (4 if tile.quads else 1)
            assert tile.columns % (4 * unit) == 0
            step_bytes = tile.columns * (2 * tile.tokens + tile.rows * bits // 8)
            most = (224 if generation == 9 else 96) << 10
            assert tile.slots == 1 or tile.slots * step_bytes * (tile.stages - 1) <= most
            assert span % unit == 0


def test_maps_of_other_strides_and_slices_of_rows():
    sketch = random_sketch(4, 2, 12, 64)
    index_map, table = on_device(sketch, torch.float16)
    padded = torch.zeros(12, index_map.shape[1] + 3, dtype=torch.uint8, device=DEVICE)
    padded[:, : index_map.shape[1]] = index_map
    dense = sketch.dense(sketch.table.half())
    for rows in (slice(None), slice(3, 9), slice(None, None, 2)):
        found = dequantize(padded[rows], table[rows], 64, backend="triton")
        assert torch.equal(found.cpu(), dense[rows])


def test_results_do_not_depend_on_tiles():
    sketch = random_sketch(4, 2, 9, 128)
    index_map, table = on_device(sketch, torch.float16)
    weight_grad = random(9, 128).to(DEVICE, torch.float32)
    tile = tiles.BlockTile(rows=2, columns=32, warps=2)
    dense = triton_linear.dequantize(index_map, table, 128)
    assert torch.equal(triton_linear.dequantize(index_map, table, 128, tile=tile), dense)
    found = triton_linear.table_grad(weight_grad, index_map, table, tile=tile)
    torch.testing.assert_close(found, triton_linear.table_grad(weight_grad, index_map, table))
    x = random(3, 128).to(DEVICE, torch.float16)
    smaller = tiles.DecodeTile(slots=2, rows=16, tokens=8, columns=32, stages=2, registers=255)
    expected = triton_linear.decode(x, index_map, table)
    found = triton_linear.decode(x, index_map, table, tile=smaller)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("hash_seed", [None, 5])
def test_operators_keep_torchs_rules(hash_seed):
    sketch = random_sketch(4, 2, rows=6, columns=64, hash_seed=hash_seed)
    index_map, table = on_device(sketch, torch.float32)
    x = torch.randn(3, 64, dtype=torch.float16, device=DEVICE).requires_grad_()
    torch.library.opcheck(
        torch.ops.spallm.lut_linear.default,
        (x, index_map, table.requires_grad_(), None, hash_seed, "triton", None),
    )


@pytest.mark.skipif(ON_GPU, reason="needs a machine without a GPU")
def test_on_cpu_tensors_the_kernels_need_the_interpreter():
    script = (
        "import torch, spallm_kernels;"
        "spallm_kernels.choose_backend(torch.device('cpu'), backend='triton')"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert "backend 'triton' cannot serve this call: tensors are on the CPU" in process.stderr


@triton.jit
def _order_kernel(source, unstacked, restacked, COUNT: tl.constexpr):
    line, entry = tl.arange(0, 16)[:, None], tl.arange(0, COUNT)[None, :]
    tensor = tl.load(source + line * COUNT + entry).reshape(16, 2, 2, 2, 2)
    entries = lookup.unstack(tensor, COUNT)
    for place in tl.static_range(COUNT):
        tl.store(unstacked + tl.arange(0, 16) * COUNT + place, entries[place])
    together = lookup.stack(entries).reshape(16, COUNT)
    tl.store(restacked + line * COUNT + entry, together)


def test_entries_of_a_table_reach_the_assembly_in_the_order_it_expects():
    """`unstack` reverses the bits of an entry's number, as `ptx.split_table` has it."""
    source = torch.arange(256, dtype=torch.int32, device=DEVICE).reshape(16, 16)
    unstacked, restacked = torch.empty_like(source), torch.empty_like(source)
    _order_kernel[(1,)](source, unstacked, restacked, COUNT=16)
    reversed_bits = [int(f"{place:04b}"[::-1], 2) for place in range(16)]
    assert torch.equal(unstacked, source[:, reversed_bits])
    assert torch.equal(restacked, unstacked)


@pytest.mark.parametrize("hash_seed", [None, 5])
def test_rows_of_an_embedding_and_their_gradients(hash_seed):
    """The sum over tokens has one order: a second call gives the same bits."""
    sketch = random_sketch(4, 2, 32, 512, dtype=torch.bfloat16, hash_seed=hash_seed)
    index_map, table = on_device(sketch, torch.bfloat16)
    ids = torch.tensor([[3, 0, 3], [31, 3, 1]], device=DEVICE)
    y_grad = random(2, 3, 512, dtype=torch.bfloat16).to(DEVICE, torch.bfloat16)
    grads = []
    for _ in range(2):
        table = table.detach().clone().requires_grad_()
        rows = lut_embedding(ids, index_map, table, 512, hash_seed=hash_seed, backend="triton")
        rows.backward(y_grad)
        grads.append(table.grad.cpu())
    assert torch.equal(rows.cpu(), sketch.dense(sketch.table.bfloat16())[ids.cpu()])
    assert torch.equal(*grads)
    exact = sketch.table.clone().requires_grad_()
    sketch.dense(exact)[ids.cpu()].backward(y_grad.cpu().double())
    assert relative_error(grads[0], exact.grad) < TOLERANCE[torch.bfloat16]
