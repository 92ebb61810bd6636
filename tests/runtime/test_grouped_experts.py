"""Experts that are computed all at once give what the model's own loop gives."""

import copy
import inspect

import pytest
import torch
import transformers

from helpers.architectures import available, save_tiny
from helpers.tuning import TOKENS, logits
from spallm_convert import SketchConfig, convert, load_sketched
from spallm_convert.runtime import experts as sketched_experts
from spallm_convert.runtime import grouped_experts
from spallm_convert.runtime.experts import SketchedExperts

#: Whether the experts of a model are computed at once: plain ones, plain ones with another
#: activation, and ones with biases or transposed weights.
MODELS = {
    "MixtralForCausalLM": True,
    "Qwen3MoeForCausalLM": True,
    "DeepseekV3ForCausalLM": True,
    "PhimoeForCausalLM": True,
    "GptOssForCausalLM": False,
    "Llama4ForCausalLM": False,
}
# Earlier versions do not mark classes, and then the loop is run as it is.
pytestmark = pytest.mark.skipif(
    "has_post_expert_norm"
    not in inspect.signature(transformers.integrations.use_experts_implementation).parameters,
    reason="this version of transformers does not say which experts can be computed at once",
)


def load(name, folder, **options):
    if not available(name):
        pytest.skip(f"this version of transformers has no {name}")
    config = SketchConfig(effort="fast", groups_per_row=2, table_dtype="float32", **options)
    convert(save_tiny(name, folder / "source"), folder / "out", config)
    return load_sketched(folder / "out", dtype=torch.float32)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return load("MixtralForCausalLM", tmp_path_factory.mktemp("mixtral"))


def experts_of(model):
    return next(module for module in model.modules() if isinstance(module, SketchedExperts))


def routed(module, tokens, chosen=2, seed=0):
    """Return inputs of a module of experts: hidden states, chosen experts, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    width = module.sketches["gate_up_proj"].shape.in_features
    scores = torch.rand(tokens, module.num_experts, generator=generator).topk(chosen)
    return torch.randn(tokens, width, generator=generator), scores.indices, scores.values


def passes(function, module, hidden, index, weights):
    """Return outputs and gradients: of hidden states, of weights, and of tables."""
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    module.zero_grad()
    y = function(module, hidden, index, weights)
    y.square().sum().backward()
    tables = [module.gate_up_proj_table.grad.clone(), module.down_proj_table.grad.clone()]
    return [y.detach(), hidden.grad, weights.grad, *tables]


def assert_same(module, *inputs):
    assert grouped_experts.can_group(module)
    found = passes(grouped_experts.run_grouped, module, *inputs)
    expected = passes(sketched_experts._run, module, *inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mapping", ["cluster", "hash"])
def test_models_compute_what_their_own_code_computes(monkeypatch, name, mapping, tmp_path):
    calls = []
    run = sketched_experts.run_grouped
    monkeypatch.setattr(
        sketched_experts, "run_grouped", lambda *a, **k: calls.append(1) or run(*a, **k)
    )
    model = load(name, tmp_path, mapping=mapping)
    found = logits(model)
    # Hashed experts that are stored one by one are numbered each from zero.
    assert bool(calls) == (MODELS[name] and mapping == "cluster")
    monkeypatch.setattr(sketched_experts, "can_group", lambda module: False)
    expected = logits(model)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_outputs_and_gradients(mixtral, tokens):
    module = experts_of(mixtral)
    assert_same(module, *routed(module, tokens))


def test_all_tokens_choose_the_same_experts(mixtral):
    module = experts_of(mixtral)
    hidden, index, weights = routed(module, 7)
    assert_same(module, hidden, torch.tensor([[1, 0]]).expand_as(index), weights)
    assert_same(module, hidden, torch.ones_like(index), weights)  # both times the same expert


def test_tokens_of_no_expert(mixtral):
    """The loop skips a number behind the last expert."""
    module = experts_of(mixtral)
    hidden, index, weights = routed(module, 7)
    index[2:4, 1] = index[5] = module.num_experts
    assert_same(module, hidden, index, weights)
    y = module(hidden, index, weights)
    assert not y[5].any()
    assert y[2].any()


@pytest.mark.parametrize("mark", grouped_experts._MARKS)
def test_classes_that_declare_something_else_are_left_to_the_loop(mixtral, mark):
    module = copy.copy(experts_of(mixtral))
    assert grouped_experts.can_group(module)
    setattr(module, mark, not grouped_experts._MARKS[mark])
    assert not grouped_experts.can_group(module)
    delattr(module, mark)
    assert not grouped_experts.can_group(module)


def test_compiles_as_one_graph(mixtral):
    """The loop depends on data, so it breaks the graph; calls for all experts do not."""
    module = experts_of(mixtral)
    inputs = routed(module, 5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), module(*inputs))


def test_half_precision(mixtral):
    model = copy.deepcopy(mixtral).bfloat16()
    module = experts_of(model)
    hidden, index, weights = routed(module, 9)
    inputs = hidden.bfloat16(), index, weights  # routers often keep weights in float32
    with torch.no_grad():
        found, expected = (run(module, *inputs) for run in (module.__class__.forward, loop))
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 2e-2 * expected.norm()
    assert model(TOKENS).logits.isfinite().all()


def loop(module, *inputs):
    return sketched_experts._run(module, *inputs)
