"""LNQ with GuidedQuant: its sums beside autograd's, its tables and codes beside a plain loop."""

import numpy as np
import pytest
import torch

from helpers.tiny_models import save_tiny_llama

ROWS, COLUMNS = 8, 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    folder = save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny").folder
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def layer():
    """Weights, inputs, and squared gradients of each group, with the guidance they give."""
    from benchmarks.quality.guided import GROUPS, Guidance

    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((90, COLUMNS)) * rng.lognormal(size=COLUMNS)
    inputs = inputs @ (np.eye(COLUMNS) + 0.2 * rng.standard_normal((COLUMNS, COLUMNS)))
    grads = rng.standard_normal((90, ROWS)) * rng.lognormal(size=(90, ROWS))
    guidance = Guidance.zeros(ROWS, COLUMNS)
    for tokens in (slice(50), slice(50, None)):
        guidance.add(
            torch.from_numpy(inputs[tokens]).float(), torch.from_numpy(grads[tokens]).float()
        )
    weights = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    hessians = [
        (inputs * part.mean(axis=1, keepdims=True)).T @ inputs
        for part in np.split(grads**2, GROUPS, axis=1)
    ]
    np.testing.assert_allclose(guidance.hessians, hessians, rtol=1e-4, atol=1e-4)
    return weights, guidance


def test_sums_are_of_the_whole_model_by_autograd(model):
    """Sums from gradients that autograd gives with a model that trains, layer by layer."""
    from benchmarks.quality.guided import guide

    tokens = torch.randint(128, (3, 16), generator=torch.Generator().manual_seed(1))
    paths = [
        f"model.layers.{number}.{name}"
        for number in range(2)
        for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    layers = {path: model.get_submodule(path) for path in paths}
    model.requires_grad_(True)
    seen, expected = {}, {path: [0, 0] for path in paths}

    def keep(path, args, output):
        output.retain_grad()
        seen[path] = args[0][0], output

    handles = [
        layer.register_forward_hook(lambda _, args, output, path=path: keep(path, args, output))
        for path, layer in layers.items()
    ]
    for sample in tokens:
        model.zero_grad()
        logits = model(sample[None]).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], sample[1:]).backward()
        for path, (x, output) in seen.items():
            grad = output.grad[0].double()
            saliency = grad.square().unflatten(1, (4, -1)).mean(2)
            expected[path][0] += torch.einsum("ti,tg,tj->gij", x.double(), saliency, x.double())
            expected[path][1] += layers[path].weight.grad.square()
    for handle in handles:
        handle.remove()
    model.zero_grad()

    found = guide(model, paths, tokens)
    assert list(found) == paths
    for path, guidance in found.items():
        hessians, squares = (part.detach().numpy() for part in expected[path])
        np.testing.assert_allclose(
            guidance.hessians, hessians, rtol=1e-3, atol=1e-5 * hessians.max(), err_msg=path
        )
        np.testing.assert_allclose(
            guidance.squares, squares, rtol=1e-3, atol=1e-5 * squares.max(), err_msg=path
        )
        assert layers[path].weight.grad is None
        assert not layers[path]._forward_hooks


@pytest.mark.parametrize("bits", [2, 3])
def test_lnq_is_a_plain_loop(layer, bits):
    """k-means, least squares and cyclic descent of one row at a time, in float64."""
    from benchmarks.quality.guided import quantize_layer
    from spallm_kernels import kmeans

    weights, guidance = layer
    table, codes = quantize_layer(weights, guidance, bits)
    assert table.shape == (ROWS, 1, 2**bits)
    assert (table == table.astype(np.float16)).all()
    for row, line in enumerate(weights.astype(np.float64)):
        hessian = guidance.hessians[row // (ROWS // 4)].astype(np.float64)
        start, _ = kmeans(weights[row : row + 1], guidance.squares[row : row + 1], 1, 2**bits)
        entries = start[0, 0]
        chosen = np.abs(line[:, None] - entries).argmin(axis=1)
        entries = solved(line, chosen, hessian, entries)
        for _ in range(2):
            for _ in range(4):
                for j in range(COLUMNS):
                    slope = (entries[chosen] - line) @ hessian[:, j]
                    lowest = entries[chosen[j]] - slope / hessian[j, j]
                    chosen[j] = np.abs(lowest - entries).argmin()
            entries = solved(line, chosen, hessian, entries)
        ours = table[row, 0, codes[row]]
        np.testing.assert_allclose(ours, entries[chosen], rtol=2e-3, atol=2e-3)


def solved(line, chosen, hessian, entries):
    """Return the best entries for codes; an entry without a code stays."""
    selection = np.eye(len(entries))[chosen]
    used = np.flatnonzero(selection.any(axis=0))
    picked = selection[:, used]
    found = entries.copy()
    found[used] = np.linalg.solve(picked.T @ hessian @ picked, picked.T @ hessian @ line)
    return found


def test_no_step_raises_the_loss_of_a_row(layer, monkeypatch):
    from benchmarks.quality import guided
    from spallm_kernels import look_up, quadratic_loss

    weights, guidance = layer
    losses = []

    def measured(step):
        def run(weights, table, codes, hessian, *rest):
            found = step(weights, table, codes, hessian, *rest)
            after = (table, found) if isinstance(found, np.ndarray) else found
            losses.append(
                [
                    quadratic_loss(weights, look_up(*pair), hessian.full)
                    for pair in ((table, codes), after)
                ]
            )
            return found

        return run

    monkeypatch.setattr(guided, "descend", measured(guided.descend))
    monkeypatch.setattr(guided, "least_squares", measured(guided.least_squares))
    guided.quantize_layer(weights, guidance, 2)
    assert len(losses) == guided.GROUPS * (1 + 2 * guided.ALTERNATIONS)
    assert all((after <= before).all() for before, after in losses)
    steps = np.array(losses).reshape(guided.GROUPS, -1, 2, ROWS // guided.GROUPS).sum(axis=(0, 3))
    assert (steps[:3, 1] < steps[:3, 0]).all()


def test_a_hessian_is_damped_as_little_as_float32_needs():
    from benchmarks.quality.guided import damped

    rng = np.random.default_rng(3)
    inputs = rng.standard_normal((60, 12)).astype(np.float32)
    full = inputs.T @ inputs
    np.testing.assert_allclose(damped(full).full, full, rtol=1e-9)
    few = inputs[:5].T @ inputs[:5]  # of rank 5
    added = damped(few).full - few
    mean = few.diagonal().astype(np.float64).mean()
    np.testing.assert_allclose(added, 1e-5 * mean * np.eye(12), atol=1e-9 * mean)


def test_rows_that_no_group_divides_and_layers_without_gradient():
    from benchmarks.quality.guided import Guidance, quantize_layer

    rng = np.random.default_rng(4)
    guidance = Guidance.zeros(6, 10)
    x = torch.from_numpy(rng.standard_normal((40, 10))).float()
    grad = torch.from_numpy(rng.standard_normal((40, 6))).float()
    guidance.add(x, grad)
    # Groups of 2, 2, 1 and 1 rows.
    alone = (grad[:, 5:].square() * x).T @ x
    np.testing.assert_allclose(guidance.hessians[3], alone, rtol=1e-4, atol=1e-4)
    weights = rng.standard_normal((6, 10)).astype(np.float32)
    assert quantize_layer(weights, guidance, 2)[1].shape == (6, 10)
    assert Guidance.zeros(2, 10).hessians.shape == (2, 10, 10)
    table, codes = quantize_layer(weights, Guidance.zeros(6, 10), 4)
    np.testing.assert_allclose(np.take_along_axis(table[:, 0], codes, 1), weights, rtol=1e-3)
