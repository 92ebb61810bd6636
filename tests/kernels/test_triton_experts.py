"""The Triton kernel of experts matches float64, in Triton's interpreter or on a GPU."""

import random as numbers

import pytest
import torch

from helpers.experts import random_experts
from helpers.sketches import TOLERANCE, random, relative_error
from helpers.triton_needed import NO_TRITON
from spallm_kernels import lut_experts

triton = pytest.importorskip("triton", reason=NO_TRITON)
tl = triton.language
from spallm_kernels.triton import experts as triton_experts  # noqa: E402
from spallm_kernels.triton import tiles  # noqa: E402
from spallm_kernels.triton.expert_blocks import find_block, most_blocks  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# With a device, these tests run on it; without one, `conftest.py` has chosen the interpreter.
pytestmark = [pytest.mark.gpu] if ON_GPU else []

#: Tokens of each expert: one token each, several blocks of one expert, all tokens to one expert,
#: fewer tokens than experts, more tokens than a block.
COUNTS = {
    "one each": [1, 1, 0, 1],
    "uneven": [3, 0, 9, 1],
    "all to one": [0, 0, 20],
    "few": [0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0],
    "many": [70, 1],
}


def products(sketch, x, dtype, **how):
    return lut_experts(
        x.to(DEVICE, dtype),
        sketch.offsets.to(DEVICE),
        sketch.index_map.to(DEVICE),
        sketch.table.to(DEVICE, how.pop("table_dtype", dtype)),
        hash_seed=sketch.sketch.hash_seed,
        **how,
    )


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("hash_seed", [None, 2**32 - 5])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_decoding(monkeypatch, bits, hash_seed, counts):
    decoded = []
    original = triton_experts.decode
    monkeypatch.setattr(
        triton_experts, "decode", lambda *a, **k: decoded.append(True) or original(*a, **k)
    )
    monkeypatch.setattr(triton_experts, "HASHED_DECODE_TOKENS", tiles.DECODE_TOKENS)
    for dtype, (rows, columns, groups) in (
        (torch.float16, (19, 96, 3)),
        (torch.bfloat16, (16, 256, 1)),
    ):
        sketch = random_experts(
            bits, groups, COUNTS[counts], rows, columns, dtype=dtype, hash_seed=hash_seed
        )
        x = random(sum(COUNTS[counts]), columns, dtype=dtype)
        how = {"backend": "triton", "table_dtype": torch.float32}
        y = products(sketch, x, dtype, **how)
        assert y.dtype == dtype
        assert relative_error(y, sketch.products(x, sketch.table)) < TOLERANCE[dtype]
        assert torch.equal(products(sketch, x, dtype, **how), y)
    assert len(decoded) == 4


@pytest.mark.parametrize("experts", [3, 40])
def test_tokens_of_no_expert(experts):
    sketch = random_experts(2, 1, [2, 3] + [0] * (experts - 2), 19, 64, dtype=torch.float16)
    x = random(9, 64, dtype=torch.float16)
    y = products(sketch, x, torch.float16, backend="triton")
    assert relative_error(y, sketch.products(x, sketch.table)) < TOLERANCE[torch.float16]
    assert not y[5:].any()


@pytest.mark.parametrize("hash_seed", [None, 7])
def test_without_assembly(hash_seed):
    sketch = random_experts(3, 2, [3, 0, 1], 19, 64, dtype=torch.float16, hash_seed=hash_seed)
    x = random(4, 64, dtype=torch.float16)
    y = products(sketch, x, torch.float16, backend="portable")
    assert relative_error(y, sketch.products(x, sketch.table)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("hash_seed", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_both_passes_without_the_decode_kernel(dtype, hash_seed):
    """Many tokens, and dtypes that the tensor cores do not take."""
    counts = [70, 0, 130] if dtype == torch.float16 else [2, 0, 3]
    sketch = random_experts(4, 2, counts, 9, 64, dtype=dtype, hash_seed=hash_seed)
    tokens = sum(counts)
    x, y_grad = random(tokens, 64, dtype=dtype), random(tokens, 9, dtype=dtype, seed=1)
    exact = [x.clone().requires_grad_(), sketch.table.clone().requires_grad_()]
    expected = sketch.products(*exact)
    expected.backward(y_grad)
    ours = [
        x.to(DEVICE, dtype).requires_grad_(),
        sketch.table.to(DEVICE, torch.float32).requires_grad_(),
    ]
    offsets, index_map = sketch.offsets.to(DEVICE), sketch.index_map.to(DEVICE)
    y = lut_experts(ours[0], offsets, index_map, ours[1], hash_seed=hash_seed, backend="triton")
    y.backward(y_grad.to(DEVICE, dtype))
    assert relative_error(y.detach(), expected.detach()) < TOLERANCE[dtype]
    for found, wanted in zip(ours, exact, strict=True):
        assert relative_error(found.grad, wanted.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("hash_seed", [None, 5])
def test_operators_keep_torchs_rules(hash_seed):
    sketch = random_experts(4, 2, [2, 0, 1], 6, 64, hash_seed=hash_seed)
    x = torch.randn(3, 64, dtype=torch.float16, device=DEVICE).requires_grad_()
    table = sketch.table.to(DEVICE, torch.float32).requires_grad_()
    offsets, index_map = sketch.offsets.to(DEVICE), sketch.index_map.to(DEVICE)
    torch.library.opcheck(
        torch.ops.spallm.lut_experts.default, (x, offsets, index_map, table, hash_seed, "triton")
    )


@triton.jit
def _blocks_kernel(
    offsets, tokens, found, EXPERTS: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr
):
    block = tl.program_id(0)
    expert, first, count = find_block(offsets, tokens, block, EXPERTS, PADDED, SIZE)
    tl.store(found + 3 * block, expert)
    tl.store(found + 3 * block + 1, first)
    tl.store(found + 3 * block + 2, count)


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("experts", [1, 4, 11])
def test_blocks_hold_every_token_once_with_its_expert(experts, size):
    draw = numbers.Random(experts)
    for most in (1, 3, 40):
        counts = [draw.choice([0, draw.randint(0, most)]) for _ in range(experts)]
        counts[draw.randrange(experts)] += 1
        offsets = torch.tensor([0, *counts]).cumsum(0)
        counts.append(draw.choice([0, draw.randint(0, most)]))  # of no expert
        blocks = most_blocks(sum(counts), experts, size)
        found = torch.full((blocks, 3), -1, dtype=torch.int32, device=DEVICE)
        _blocks_kernel[(blocks,)](
            offsets.to(DEVICE),
            sum(counts),
            found,
            EXPERTS=experts,
            PADDED=triton.next_power_of_2(experts + 1),
            SIZE=size,
        )
        tokens = [
            (expert, token)
            for expert, first, count in found.tolist()
            for token in range(first, first + max(0, count))
        ]
        wanted = [expert for expert, count in enumerate(counts) for _ in range(count)]
        assert tokens == [(expert, token) for token, expert in enumerate(wanted)]
        assert max(found[:, 2]) <= size


def test_most_blocks_are_reached():
    """One expert with all spare tokens, in full blocks behind its first token."""
    assert most_blocks(1, 8, 8) == 1
    assert most_blocks(8, 8, 8) == 8
    assert most_blocks(4 + 16, 3, 8) == 6  # 17, 1, 1, and 1 of no expert
    assert most_blocks(5, 8, 1) == 5


def test_tokens_of_a_block():
    assert tiles.block_tokens(8, 64) == 1
    assert tiles.block_tokens(16, 64) == 1
    assert tiles.block_tokens(17, 64) == 8
    assert tiles.block_tokens(256, 64) == 8
    assert tiles.block_tokens(1000, 64) == 32
    assert tiles.block_tokens(10000, 64) == tiles.DECODE_TOKENS
