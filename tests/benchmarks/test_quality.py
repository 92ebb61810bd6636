"""The quality benchmark without its peers: runs end to end, its plain methods."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from helpers.tiny_models import save_tiny_llama
from helpers.tiny_tokenizer import tiny_tokenizer
from spallm_formats import sha256

ROOT = Path(__file__).parents[2]
WORDS = "the river runs to the sea and the rain comes back to the hills. "
FEW = ("--samples", "4", "--seqlen", "16", "--eval-tokens", "64", "--window", "32")
OWN = ("dense", "rtn-4bit-g128", "leanquant-3bit", "hash-4bit-gpr4", "sketch-2bit-gpr1")
WEIGHTS = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 160)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny").folder
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(WORDS * 8)
    return path


@pytest.fixture
def in_process(monkeypatch):
    """Jobs go through JSON as they do on their way to a process. Lists what was run."""
    from benchmarks.quality import __main__ as quality
    from benchmarks.quality import one_run

    jobs = []

    def run_job(job, scratch):
        jobs.append(job.method)
        return json.loads(json.dumps(one_run.measure(job)))

    monkeypatch.setattr(quality, "run_job", run_job)
    return jobs


def run(tmp_path, model, text, *options):
    from benchmarks.quality import __main__ as quality

    common = ("--model", model, "--text", text, "--output", tmp_path / "quality.json")
    common += ("--cache", tmp_path / "cache")
    arguments = [str(option) for option in (*common, *FEW, *options)]
    return CliRunner().invoke(quality.main, arguments)


def methods(*names):
    return [option for name in names for option in ("--method", name)]


def rows(tmp_path):
    return {
        row["method"]: row for row in json.loads((tmp_path / "quality.json").read_text())["runs"]
    }


def test_a_run_in_a_process_of_its_own(tmp_path, model, text):
    output = tmp_path / "quality.json"
    folders = (ROOT, ROOT / "formats", ROOT / "kernels")
    process = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.quality", *FEW, "--method", "dense"),
            *("--model", model, "--text", text, "--output", output),
            *("--cache", tmp_path / "cache"),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    row = rows(tmp_path)["dense"]
    assert row["bits_per_weight"] == 16
    assert row["model_bytes"] == (model / "model.safetensors").stat().st_size - header(model)
    assert row["perplexity"] == pytest.approx(math.exp(row["nats_per_token"]))
    assert row["tokens"] == 64 - 2  # a window's first token has no prediction


def header(model):
    return 8 + int.from_bytes((model / "model.safetensors").read_bytes()[:8], "little")


def test_methods_of_all_kinds_are_measured_and_not_measured_again(
    tmp_path, in_process, model, text
):
    names = (*OWN, "guided-3bit", "sketch-calibrated-3bit-gpr4", "sketch-allocated-3.75bit")
    result = run(tmp_path, model, text, *methods(*names[:4]))
    assert result.exit_code == 0, result.output
    result = run(tmp_path, model, text, *methods(*names))
    assert result.exit_code == 0, result.output
    assert in_process == list(names)
    found = rows(tmp_path)
    assert [name for name, row in found.items() if row["calibrated"]] == [
        "leanquant-3bit",
        "guided-3bit",
        "sketch-calibrated-3bit-gpr4",
        "sketch-allocated-3.75bit",
    ]
    assert 3 < found["sketch-allocated-3.75bit"]["bits_per_weight"] <= 3.75
    assert all(row["quantized_weights"] == WEIGHTS for row in found.values())
    assert len({row["perplexity"] for row in found.values()}) == len(names)
    sizes = {name: row["bits_per_weight"] * WEIGHTS for name, row in found.items()}
    layers = 2 * [(64, 64), (32, 64), (32, 64), (64, 64), (160, 64), (160, 64), (64, 160)]
    # Groups of 128: a row of 64 has one, one of 160 has two.
    assert sizes["rtn-4bit-g128"] == pytest.approx(
        sum(o * (i * 4 + (1 if i == 64 else 2) * 20) for o, i in layers)
    )
    for name in ("leanquant-3bit", "guided-3bit"):
        assert sizes[name] == pytest.approx(sum(o * (i * 3 + 8 * 16) for o, i in layers))
    assert sizes["hash-4bit-gpr4"] == pytest.approx(sum(o * 4 * 16 * 16 for o, i in layers))
    # Rows of index maps are padded to 16 bytes.
    assert sizes["sketch-2bit-gpr1"] == pytest.approx(
        sum(o * (8 * 16 * -(-i * 2 // 128) + 4 * 16) for o, i in layers)
    )


def test_a_file_of_other_settings_is_refused(tmp_path, in_process, model, text):
    assert run(tmp_path, model, text, *methods("dense")).exit_code == 0
    result = run(tmp_path, model, text, *methods("dense"), "--seed", "1")
    assert result.exit_code == 1
    assert "settings.seed: 0 in the file, 1 now" in result.output
    other = tmp_path / "other.txt"
    other.write_text(WORDS * 9)
    result = run(tmp_path, model, other, *methods("dense"))
    assert "settings.text_sha256" in result.output
    (tmp_path / "quality.json").write_text('{"benchmark": "finetune"}')
    result = run(tmp_path, model, text, *methods("dense"))
    assert "benchmark: 'finetune' in the file, 'quality' now" in result.output
    assert in_process == ["dense"]


def test_another_kernel_or_writer_of_the_model_is_no_other_setting(
    tmp_path, in_process, model, text
):
    dense = shutil.copytree(model, tmp_path / "dense")
    assert run(tmp_path, dense, text, *methods("dense")).exit_code == 0
    written = tmp_path / "quality.json"
    document = json.loads(written.read_text())
    document["machine"]["platform"] = "another kernel"
    written.write_text(json.dumps(document))
    config = json.loads((dense / "config.json").read_text())
    config["transformers_version"] = "5.0.0"
    (dense / "config.json").write_text(json.dumps(config))
    assert run(tmp_path, dense, text, *methods("dense")).exit_code == 0
    config["rope_parameters"]["rope_theta"] = 1e6
    (dense / "config.json").write_text(json.dumps(config))
    assert "settings.model_digest" in run(tmp_path, dense, text, *methods("dense")).output
    assert in_process == ["dense"]


def test_a_text_that_is_too_short_is_refused(tmp_path, in_process, model, text):
    result = run(tmp_path, model, text, "--eval-tokens", "4096", *methods("dense"))
    assert result.exit_code == 1
    assert "text.txt is too short: its second half has" in result.output
    assert not in_process


def test_methods_whose_packages_are_missing_are_refused(tmp_path, monkeypatch, model, text):
    from benchmarks.quality import methods as quality_methods

    monkeypatch.setitem(quality_methods.PEERS, "rtn", ("no_such_package",))
    result = run(tmp_path, model, text, *methods("rtn-4bit-g128"))
    assert result.exit_code == 2
    assert "not installed: no_such_package" in result.output


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_is_that_of_the_plain_way(bits):
    from benchmarks.quality.quantize import round_to_nearest

    rng = np.random.default_rng(bits)
    weights = rng.standard_normal((5, 22)).astype(np.float32)
    weights[1] = 0  # has no scale
    weights[2] = np.abs(weights[2]) + 1  # zero is not among them
    found = round_to_nearest(weights, bits, 8)
    top = 2**bits - 1
    for row, line in enumerate(weights):
        for first in (0, 8, 16):
            part = [float(w) for w in line[first : first + 8]]
            low, high = min(0.0, *part), max(0.0, *part)
            scale = float(np.float16(np.float32(high - low) / top)) or 1.0
            zero = min(top, max(0, round(-low / scale)))
            for column, weight in enumerate(part, first):
                code = min(top, max(0, round(weight / scale) + zero))
                assert found[row, column] == pytest.approx((code - zero) * scale, abs=1e-6)
    assert (found[1] == 0).all()


@pytest.mark.parametrize("bits", [3, 4])
def test_leanquant_is_a_plain_loop_over_columns(bits):
    """GPTQ's loop with the factor of the inverse, in float64, for tables with their weights."""
    from benchmarks.quality.leanquant import quantize_layer

    rng = np.random.default_rng(bits)
    columns, rows = 24, 6
    inputs = rng.standard_normal((60, columns)) * rng.lognormal(size=columns)
    inputs = inputs @ (np.eye(columns) + 0.2 * rng.standard_normal((columns, columns)))
    hessian = inputs.T @ inputs
    weights = rng.standard_normal((rows, columns)).astype(np.float32)
    table, codes = quantize_layer(weights, hessian, bits)

    damped = hessian + 0.1 * hessian.diagonal().mean() * np.eye(columns)
    order = np.argsort(-damped.diagonal())
    inverse = np.linalg.inv(damped[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T
    left = weights[:, order].astype(np.float64)
    for i in range(columns):
        distance = np.abs(left[:, i, None] - table[:, 0])
        expected = distance.argmin(axis=1)
        assert (codes[:, order[i]] == expected).all()
        error = (left[:, i] - table[np.arange(rows), 0, expected]) / upper[i, i]
        left[:, i:] -= error[:, None] * upper[i, i:]
    assert (table == table.astype(np.float16)).all()


def test_leanquants_tables_are_weighted_by_the_factor_of_the_inverse():
    from benchmarks.quality.leanquant import POWERS, quantize_layer
    from spallm_kernels import kmeans

    assert POWERS == {4: 4, 3: 3, 2: 3}
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((40, 16)) * rng.lognormal(size=16)
    hessian = inputs.T @ inputs
    weights = rng.standard_normal((3, 16)).astype(np.float32)
    table, _ = quantize_layer(weights, hessian, 2)
    damped = hessian + 0.1 * hessian.diagonal().mean() * np.eye(16)
    order = np.argsort(-damped.diagonal())
    factor = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).diagonal()
    mass = np.empty(16)
    mass[order] = factor**-3.0
    expected, _ = kmeans(weights, (mass / mass.max()).astype(np.float32)[None], 1, 4)
    np.testing.assert_allclose(table, expected, rtol=2e-3, atol=1e-3)


def test_healed_sketches_go_on_with_calibrated_ones(tmp_path, model, text, in_process, monkeypatch):
    from benchmarks.quality import quantize as quality_quantize
    from benchmarks.quality import table as quality_table
    from benchmarks.shared.drawing import PlotError
    from spallm_convert.calibration import calibrate

    monkeypatch.setattr(quality_quantize, "HEAL_STEPS", 2)
    names = [f"sketch-{kind}-3bit-gpr1" for kind in ("calibrated", "healed")]
    assert run(tmp_path, model, text, *methods(names[0])).exit_code == 0
    monkeypatch.setattr(calibrate, "_sketch", None)  # not to be called again
    result = run(tmp_path, model, text, *methods(names[1], "dense"))
    assert result.exit_code == 0, result.output
    calibrated, healed = (rows(tmp_path)[name] for name in names)
    assert (calibrated["continues"], healed["continues"]) == (None, "sketch-calibrated")
    assert calibrated["bits_per_weight"] == healed["bits_per_weight"]
    assert calibrated["perplexity"] != healed["perplexity"]
    calibrated |= {"conversion_cpu_seconds": 100, "conversion_peak_bytes": 3e9}
    healed |= {"conversion_cpu_seconds": 40, "conversion_peak_bytes": 2e9}
    dense = rows(tmp_path)["dense"]
    lines = quality_table.table([dense, calibrated, healed]).splitlines()
    costs = {line.split(" | ")[0]: line.split(" | ")[5:] for line in lines[2:]}
    assert [costs[f"| {name}"] for name in names] == [["100", "3.00 |"], ["140", "3.00 |"]]
    with pytest.raises(PlotError, match="healed-3bit-gpr1 continues a run of sketch-calibrated"):
        quality_table.table([dense, healed])


def test_blocks_of_a_run_that_was_stopped_are_not_gone_on_with(model, text, tmp_path, monkeypatch):
    from benchmarks.quality import quantize as quality_quantize
    from benchmarks.quality.methods import METHODS

    monkeypatch.setattr(quality_quantize, "HEAL_STEPS", 2)
    drawn = {"samples": 4, "seqlen": 16, "seed": 0}
    kept = tmp_path / "kept"
    subject = quality_quantize.open_subject(model, tmp_path, kept, text, **drawn)
    with monkeypatch.context() as patched:
        patched.setattr(quality_quantize.ConversionProgress, "advance", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            quality_quantize.quantize(METHODS["sketch-calibrated-3bit-gpr1"], subject)
    assert kept.exists()
    healed = quality_quantize.quantize(METHODS["sketch-healed-3bit-gpr1"], subject)
    assert healed.continues is None


def _interrupt(*arguments):
    raise KeyboardInterrupt


def test_what_is_kept_is_of_the_same_sources(monkeypatch):
    from benchmarks.quality import __main__ as quality

    document = {"settings": {}, "versions": {}}
    before = quality._identity(document)
    assert quality._identity(document) == before
    changed = list((ROOT / "kernels").rglob("hessian.py"))
    monkeypatch.setattr(
        quality, "sha256", lambda path: "other" if path in changed else sha256(path)
    )
    assert quality._identity(document) != before


def test_leanquant_sees_the_inputs_behind_quantized_layers(model, text, tmp_path):
    """The second block's first layers, quantized by hand behind a first block as it came out."""
    from transformers import AutoModelForCausalLM

    from benchmarks.quality.leanquant import quantize_layer
    from benchmarks.quality.methods import METHODS
    from benchmarks.quality.quantize import open_subject, quantize
    from spallm_convert.calibration.windows import CalibrationText
    from spallm_kernels import look_up

    drawn = {"samples": 4, "seqlen": 16, "seed": 0}
    subject = open_subject(model, tmp_path, tmp_path / "kept", text, **drawn)
    found = dict(quantize(METHODS["leanquant-4bit"], subject).weights)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for path, weight in found.items():
            if ".layers.0." in path:
                dense.get_submodule(path).weight.copy_(weight)
    layer = dense.model.layers[1].self_attn.k_proj
    seen = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 64)))
    tokens = CalibrationText(tiny_tokenizer(), str(text)).draw(**drawn)
    with torch.no_grad():
        dense(tokens)
    inputs = seen[0].double().numpy()
    table, codes = quantize_layer(layer.weight.detach().numpy(), inputs.T @ inputs, 4)
    ours = found["model.layers.1.self_attn.k_proj"].numpy()
    assert np.mean(np.isclose(ours, look_up(table, codes), atol=1e-4)) > 0.98
