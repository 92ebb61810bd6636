"""On a CUDA device: layers of real size, memory, compilation, CUDA graphs, and a whole model."""

import pytest
import torch
from transformers import StaticCache

from helpers.architectures import save_tiny
from helpers.experts import random_experts
from helpers.sketches import TOLERANCE, random, relative_error
from spallm_convert import SketchConfig, convert, load_sketched
from spallm_convert.devices import full_float32
from spallm_convert.runtime.linear import SketchedLinear
from spallm_formats import SketchedModule
from spallm_kernels import (
    choose_backend,
    dispatch,
    fallback,
    grouped,
    lut_experts,
    lut_linear,
    lut_linear_sets,
)
from spallm_kernels.self_check import find_fault

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def layer(bits, rows, columns, groups, *, hash_seed=None, table_dtype=torch.float32):
    """A layer of random codes and tables on the device, frozen but for the tables."""
    torch.manual_seed(bits)
    shape = SketchedModule(bits=bits, groups_per_row=groups, out_features=rows, in_features=columns)
    made = SketchedLinear(
        shape, bias=None, table_dtype=table_dtype, hash_seed=hash_seed, device="cuda"
    )
    with torch.no_grad():
        made.weight.random_(0, 256)
        made.weight_table.normal_(std=columns**-0.5)
    return made


def float64(sketched, x, dtype):
    """The product in float64, by the plain reference."""
    table = sketched.weight_table.detach().to(dtype).double()
    how = {"hash_seed": sketched.hash_seed, "backend": "reference"}
    return lut_linear(x.double(), sketched.weight, table, **how)


def test_the_kernels_serve_a_device_by_default():
    assert choose_backend(torch.device("cuda")) == "triton"


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_kernels_pass_their_check_on_the_device(bits):
    device = torch.device("cuda", torch.cuda.current_device())
    assert dispatch.check_gpu(device, bits) == {"triton": None}
    assert find_fault(dispatch.load_decoder("portable"), device, bits) is None


def test_a_first_call_while_a_graph_is_captured(monkeypatch, tmp_path):
    """No check runs there; the first call after it runs the check."""
    sketched, x = layer(4, 64, 512, 1), torch.ones(1, 512, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        expected = sketched(x)  # compiled before
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        fallback._decide.cache_clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = sketched(x)
        assert not list(tmp_path.iterdir())
        graph.replay()
        assert torch.equal(y, expected)
        assert torch.equal(sketched(x), expected)
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("rows", "columns", "groups"),
    [(4096, 4096, 4), (1024, 4096, 1), (4096, 14336, 4), (576, 1536, 8)],
)
def test_layers_of_real_size(rows, columns, groups, bits, dtype):
    sketched = layer(bits, rows, columns, groups)
    for tokens in (1, 2, 5, 16, 33, 64, 65, 300):
        x = torch.randn(tokens, columns, device="cuda").to(dtype)
        with torch.no_grad():
            y, again = sketched(x), sketched(x)
        assert torch.equal(y, again)
        assert relative_error(y, float64(sketched, x, dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hashed_layers_of_real_size(bits):
    sketched = layer(bits, 4096, 4096, 4, hash_seed=2**32 - 5)
    for tokens in (1, 16, 100):
        x = torch.randn(tokens, 4096, device="cuda").bfloat16()
        with torch.no_grad():
            y = sketched(x)
        error = relative_error(y, float64(sketched, x, torch.bfloat16))
        assert error < TOLERANCE[torch.bfloat16]


def own_tables(sketched, slots):
    """Sets of tables for the codes of a layer."""
    return torch.randn(slots, *sketched.weight_table.shape, device="cuda") / 64


def float64_sets(sketched, tables, sets, x):
    """The product of each token with its own tables in float64, by the plain reference."""
    given = (sketched.weight_table.detach(), tables)
    base, others = (each.to(x.dtype).double() for each in given)
    how = {"hash_seed": sketched.hash_seed, "backend": "reference"}
    return lut_linear_sets(x.double(), sketched.weight, base, others, sets, **how)


@pytest.mark.parametrize("hash_seed", [None, 7])
@pytest.mark.parametrize(("bits", "groups"), [(2, 1), (3, 4), (4, 1), (4, 4)])
def test_sets_of_tables_of_a_layer_of_real_size(bits, groups, hash_seed):
    """Up to 512 tokens in one call of the kernel; of more, sets with many have a dense weight."""
    sketched = layer(bits, 4096, 4096, groups, hash_seed=hash_seed)
    tables = own_tables(sketched, 9)
    tables[8] = torch.nan  # no token names it
    operands = sketched.weight, sketched.weight_table.detach(), tables
    for tokens in (1, 7, 16, 64, 512, 600):
        x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
        mixed = torch.randint(-1, 8, (tokens,), device="cuda")
        uneven = torch.where(torch.rand(tokens, device="cuda") < 0.9, -1, mixed)
        for sets in (mixed, uneven, torch.full_like(mixed, -1), torch.full_like(mixed, 3)):
            y, again = (lut_linear_sets(x, *operands, sets, hash_seed=hash_seed) for _ in range(2))
            assert torch.equal(y, again)
            expected = float64_sets(sketched, tables, sets, x)
            assert relative_error(y, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("tokens", [1, 16, 300, 2000])
def test_sets_of_tables_replay_from_a_cuda_graph_with_other_sets(tokens, monkeypatch):
    """Nothing about the sets is fixed by the capture. While it lasts, no call waits."""
    from spallm_kernels.triton import tenants

    sketched = layer(4, 1024, 2048, 4)
    tables, x = own_tables(sketched, 20), torch.randn(tokens, 2048, device="cuda").half()
    sets = torch.full((tokens,), -1, device="cuda")
    operands = x, sketched.weight, sketched.weight_table.detach(), tables, sets
    with monkeypatch.context() as patched:
        patched.setattr(tenants, "GRAPH_TOKENS", tokens)
        lut_linear_sets(*operands)  # compiled before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lut_linear_sets(*operands)
    for chosen in (torch.arange(tokens) % 20, torch.randint(-1, 20, (tokens,))):
        sets.copy_(chosen)
        graph.replay()
        expected = float64_sets(sketched, tables, sets, x)
        assert relative_error(y, expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gradients_of_a_layer_of_real_size(bits, dtype):
    sketched = layer(bits, 4096, 2048, 4)
    x = torch.randn(600, 2048, device="cuda").to(dtype).requires_grad_()
    y_grad = torch.randn(600, 4096, device="cuda").to(dtype)
    gradients = []
    for _ in range(2):
        sketched.weight_table.grad = x.grad = None
        sketched(x).backward(y_grad)
        gradients.append((x.grad, sketched.weight_table.grad))
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
    exact = x.detach().double().requires_grad_()
    table = sketched.weight_table.detach().to(dtype).double().requires_grad_()
    lut_linear(exact, sketched.weight, table, backend="reference").backward(y_grad.double())
    for found, expected in zip(gradients[0], (exact.grad, table.grad), strict=True):
        assert relative_error(found, expected) < TOLERANCE[dtype]


def test_no_dense_weight_is_kept_and_hardly_more_than_one_made():
    rows, columns, tokens = 4096, 4096, 4096
    sketched = layer(4, rows, columns, 4)
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y_grad = torch.randn(tokens, rows, device="cuda", dtype=torch.bfloat16)
    sketched(x).backward(y_grad)  # compiles, and makes the library's workspaces
    sketched.weight_table.grad = x.grad = None
    dense = rows * columns * 2
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = sketched(x)
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    assert kept < 0.01 * dense
    y.backward(y_grad)
    outputs = y.nbytes + x.grad.nbytes + sketched.weight_table.grad.nbytes
    assert torch.cuda.max_memory_allocated() - before - outputs <= 1.1 * dense


def test_compiles_as_one_graph():
    first, second = layer(4, 512, 256, 2), layer(3, 256, 512, 1, hash_seed=3)

    def block(x):
        return x + second(torch.nn.functional.silu(first(x)))

    for tokens in (1, 100):
        x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
        compiled = torch.compile(block, fullgraph=True)
        assert relative_error(compiled(x), block(x)) < 1e-2
        compiled(x).sum().backward()
        found = first.weight_table.grad
        first.weight_table.grad = None
        block(x).sum().backward()
        assert relative_error(found, first.weight_table.grad) < 1e-2
        first.weight_table.grad = None


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "out"
    convert(tiny_llama.folder, out, SketchConfig(effort="fast", groups_per_row=2))
    return out


def test_a_model_on_the_gpu_gives_the_cpus_logits(folder):
    tokens = torch.arange(2, 40).reshape(2, 19)
    expected = load_sketched(folder, dtype=torch.float32)(tokens).logits
    model = load_sketched(folder, dtype=torch.float32, device_map="cuda")
    found = model(tokens.cuda()).logits.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_experts_on_the_gpu_give_the_cpus_logits_and_gradients(name, tmp_path):
    """gpt-oss has transposed weights, biases, and an activation of its own."""
    source = save_tiny(name, tmp_path / "source")
    convert(
        source, tmp_path / "out", SketchConfig(effort="fast", groups_per_row=1, embeddings=True)
    )
    ids = torch.arange(24).reshape(2, 12)
    found = []
    for device in ("cpu", "cuda"):
        model = load_sketched(tmp_path / "out", dtype=torch.float32).to(device)
        with full_float32():
            logits = model(ids.to(device)).logits
            logits.square().mean().backward()
        tables = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        found.append((logits.detach().cpu(), *tables))
    assert len(found[0]) == len(found[1]) > 1
    for cpu, gpu in zip(*found, strict=True):
        assert relative_error(gpu, cpu.double()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hash_seed", [None, 7])
def test_many_tokens_of_experts(dtype, hash_seed, monkeypatch):
    """Several experts at a time, by grouped products in bfloat16; two have no tokens."""
    monkeypatch.setattr(grouped, "GROUPED_ELEMENTS", 3 * 256 * 512)
    counts = [700, 0, 100, 300, 1, 0, 900, 200]
    made = random_experts(4, 2, counts, 256, 512, dtype=dtype, hash_seed=hash_seed)
    x, y_grad = random(2201, 512, dtype=dtype), random(2201, 256, dtype=dtype, seed=1)
    exact = [x.clone().requires_grad_(), made.table.clone().requires_grad_()]
    expected = made.products(*exact)
    expected.backward(y_grad)
    ours = [x.cuda().to(dtype).requires_grad_(), made.table.cuda().float().requires_grad_()]
    y = lut_experts(
        ours[0], made.offsets.cuda(), made.index_map.cuda(), ours[1], hash_seed=hash_seed
    )
    y.backward(y_grad.cuda().to(dtype))
    assert relative_error(y.detach(), expected.detach()) < TOLERANCE[dtype]
    for found, wanted in zip(ours, exact, strict=True):
        assert relative_error(found.grad, wanted.grad) < TOLERANCE[dtype]
    assert not ours[1].grad[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layouts_that_the_grouped_product_refuses(dtype):
    """Rows of a wider matrix, some of no expert, and the gradient of a sum, with strides of 0."""
    made = random_experts(4, 4, [512] * 7 + [505], 512, 512, dtype=dtype)
    inputs = random(4096, 513, dtype=dtype)
    exact = [inputs[:, 1:].clone().requires_grad_(), made.table.clone().requires_grad_()]
    expected = made.products(*exact)
    expected.sum().backward()
    ours = [inputs.cuda().to(dtype).requires_grad_(), made.table.cuda().float().requires_grad_()]
    y = lut_experts(ours[0][:, 1:], made.offsets.cuda(), made.index_map.cuda(), ours[1])
    y.sum().backward()
    assert relative_error(y.detach(), expected.detach()) < TOLERANCE[dtype]
    assert not y[-7:].any()
    for found, wanted in zip((ours[0].grad[:, 1:], ours[1].grad), exact, strict=True):
        assert relative_error(found, wanted.grad) < TOLERANCE[dtype]


def test_a_whole_decoding_step_replays_from_a_cuda_graph(folder):
    model = load_sketched(folder, dtype=torch.bfloat16, device_map="cuda").eval()
    prompt = torch.arange(2, 14, device="cuda")[None]
    cache = StaticCache(config=model.config, max_cache_len=32)
    token = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    position = torch.zeros(1, dtype=torch.long, device="cuda")

    def step():
        where = {"position_ids": position[None], "cache_position": position}
        return model(token, past_key_values=cache, use_cache=True, **where).logits

    def decode(run):
        cache.reset()
        with torch.no_grad():
            model(
                prompt,
                past_key_values=cache,
                cache_position=torch.arange(12, device="cuda"),
                use_cache=True,
            )
            found = []
            for place in range(12, 20):
                token.fill_(place)
                position.fill_(place)
                found.append(run().clone())
        return torch.cat(found)

    expected = decode(step)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        logits = step()

    def replay():
        graph.replay()
        return logits

    assert torch.equal(decode(replay), expected)
