"""On a CUDA device: the steps of calibration, and a calibrated conversion."""

import pytest
import torch
from safetensors.torch import load_file

import spallm_kernels
from helpers.calibration import contents, options
from helpers.exact_layers import exact_layer
from helpers.hessians import correlated_hessian, sorted_tables, weight_rows
from helpers.sketches import relative_error
from spallm_convert import convert, load_sketched
from spallm_convert.calibration import backends
from spallm_convert.devices import full_float32
from spallm_kernels import batched, dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_column_kernels_decide_as_the_loops_in_torch(bits):
    """A layer in whose arithmetic nothing is rounded, and one with correlated inputs."""
    device = torch.device("cuda")
    assert dispatch.choose_column_backend(device, 2**bits) == "triton"
    exact = exact_layer(300, 512, 4, 2**bits, device=device)
    weights = weight_rows(300, 512, seed=bits)
    table = sorted_tables(weights, 4, 2**bits, seed=bits)
    arrays = weights, table, spallm_kernels.assign(weights, table)
    hessian = torch.from_numpy(correlated_hessian(512, 0, dead=(5, 130))).cuda()
    with full_float32():
        for tensors, prepared, same in (
            (*exact, 1.0),
            # Equal where torch's `addcmul` is fused too; else sums differ in the last bit, and
            # with them the codes of weights next to a middle.
            (
                [torch.from_numpy(array).cuda() for array in arrays],
                batched.prepare_hessian(hessian, 0.03),
                0.999,
            ),
        ):
            rows, tables, start = tensors
            for step, *operands in (
                (batched.compensate, rows, tables, prepared),
                (batched.descend, rows, tables, start, prepared, 3),
            ):
                ours, theirs = (step(*operands, backend=name) for name in ("triton", "torch"))
                assert torch.equal(ours, step(*operands))
                assert (ours == theirs).double().mean() >= same
                losses = [
                    batched.quadratic_loss(
                        rows, batched.look_up(tables, codes), prepared.full
                    ).sum()
                    for codes in (ours, theirs)
                ]
                torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_layer_is_sketched_as_on_the_cpu(bits):
    weights, hessian = weight_rows(512, 1024, seed=0), correlated_hessian(1024, 0, dead=(5,))
    expected = spallm_kernels.fit(
        weights, spallm_kernels.prepare_hessian(hessian, 0.03), 2, 2**bits
    )
    with full_float32():
        prepared = batched.prepare_hessian(torch.from_numpy(hessian).cuda(), 0.03)
        rows = torch.from_numpy(weights).cuda()
        first, second = (batched.fit(rows, prepared, 2, 2**bits) for _ in range(2))
        dense = batched.look_up(first.table, first.codes)
        lost = batched.quadratic_loss(rows, dense, prepared.full).sum().item()
    assert torch.equal(first.table, second.table)
    assert torch.equal(first.codes, second.codes)
    assert first.losses[0][1] == pytest.approx(expected.losses[0][1], rel=1e-4)
    assert first.losses[-1][1] == pytest.approx(lost, rel=1e-6)
    assert lost == pytest.approx(expected.losses[-1][1], rel=0.01)


@pytest.mark.parametrize("mapping", ["cluster", "hash"])
def test_a_calibrated_conversion_gives_the_sketches_of_the_cpu(
    source, text, tmp_path, mapping, monkeypatch
):
    config, ran = options(text, mapping=mapping), []
    with monkeypatch.context() as patched:
        patched.setattr(backends, "prepare_hessian", lambda *a: ran.append("numba"))
        torch.set_float32_matmul_precision("high")  # as a user may have allowed it
        try:
            found = convert(source, tmp_path / "gpu", config)
            convert(source, tmp_path / "again", config, device="cuda:0")
        finally:
            torch.set_float32_matmul_precision("highest")
    assert ran == []
    assert found.document["device"] == torch.cuda.get_device_name()
    assert contents(tmp_path / "gpu") == contents(tmp_path / "again")
    expected = convert(source, tmp_path / "cpu", config, device="cpu")
    assert expected.document["device"] == "cpu"
    for total in ("relative_error", "relative_output_error"):
        assert found.totals[total] == pytest.approx(expected.totals[total], rel=0.02)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("gpu", "cpu"))
    assert ours.keys() == theirs.keys()
    for name in {module["name"] for module in found.modules}:
        tables = [tensors[f"{name}.weight_table"] for tensors in (ours, theirs)]
        assert relative_error(*tables) < 0.1
    load_sketched(tmp_path / "gpu", device_map="cuda")


def test_a_calibrated_conversion_is_healed_on_the_gpu(source, text, tmp_path):
    report = convert(source, tmp_path / "out", options(text, heal=4), device="cuda")
    healing = report.document["healing"]
    assert 0 < healing["kl_after"] < healing["kl_before"]
    convert(source, tmp_path / "again", options(text, heal=4), device="cuda")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
