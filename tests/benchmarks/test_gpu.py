"""The GPU suite without a GPU: a smoke run of all of it, its verdicts, what it does on failure."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.triton_needed import NO_TRITON
from spallm_kernels import lut_linear

ROOT = Path(__file__).parents[2]
LAYERS = ("4096x4096", "14336x4096", "4096x14336", "8192x28672")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The document of a smoke run."""
    pytest.importorskip("triton", reason=NO_TRITON)
    output = tmp_path_factory.mktemp("smoke") / "gpu.json"
    folders = (ROOT, ROOT / "formats", ROOT / "kernels")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--output", output]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads(output.read_text())


@pytest.mark.slow
def test_a_smoke_run_goes_through_every_section(smoke):
    from benchmarks.gpu.sections import SECTIONS

    assert list(smoke["sections"]) == list(SECTIONS)
    for name, section in smoke["sections"].items():
        assert section["errors"] == []
        if name == "nf4" and section["status"] != "done":
            assert section["status"].startswith("not run: bitsandbytes is not installed")
        else:
            assert section["status"] == "done"
            assert section["rows"]


@pytest.mark.slow
def test_a_smoke_run_says_that_it_holds_no_figures(smoke):
    assert smoke["smoke"] is True
    assert "no figure in this file is a measurement" in smoke["figures"]
    assert smoke["device"]["kind"] == "cpu"


@pytest.mark.slow
def test_bars_come_from_the_sections_of_the_same_file(smoke):
    from benchmarks.gpu.bars import judge

    assert judge(smoke["sections"]) == smoke["bars"]
    rows = smoke["sections"]["forward"]["rows"]
    figures = {r["layer"]: r["speedup"] for r in rows if r["tokens"] == 1}
    bar = smoke["bars"][0]
    assert bar["cases"] == {layer: figures[layer] for layer in LAYERS[1:]}
    assert bar["figure"] == min(bar["cases"].values())
    model = smoke["sections"]["model"]["rows"][0]
    assert all(model["replay_gives_the_tokens_of_eager"].values())


def test_a_smoke_run_never_writes_over_figures_unasked(monkeypatch):
    from benchmarks.gpu import __main__ as gpu

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke"])
    assert ROOT not in gpu._options().output.resolve().parents
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu._options().output == gpu.RESULTS / "gpu.json"


def forward(**speedups):
    """A section of products of one token."""
    rows = [
        {"layer": layer, "tokens": 1, "speedup": speedup, "gigabytes_per_second": {"ours": 2000.0}}
        for layer, speedup in speedups.items()
    ]
    return {"forward": {"status": "done", "rows": rows}}


def bar(sections, name):
    from benchmarks.gpu.bars import judge

    (found,) = [row for row in judge(sections) if row["bar"] == name]
    return found["figure"], found["met"]


def test_a_bar_is_met_by_its_worst_layer_only_when_all_are_measured():
    name = "1 token, cuBLAS's time over ours"
    fast = dict.fromkeys(LAYERS, 3.5)
    assert bar(forward(**fast), name) == (3.5, True)
    assert bar(forward(**fast | {"4096x14336": 3.0}), name) == (3.0, True)
    assert bar(forward(**fast | {"4096x14336": 2.9}), name) == (2.9, False)
    assert bar(forward(**fast | {"4096x4096": 1.0}), name) == (3.5, True)  # only larger ones count
    del fast["8192x28672"]
    assert bar(forward(**fast), name) == (3.5, None)
    assert bar(forward(**fast | {"14336x4096": 1.0}), name) == (1.0, False)
    assert bar({}, name) == (None, None)


def test_the_share_of_a_copy_is_of_the_copy_in_the_same_run():
    from benchmarks.gpu.bars import add_shares

    sections = forward(**{"8192x28672": 4.0})
    name = "1 token, share of the copy's bandwidth"
    add_shares(sections)
    assert bar(sections, name) == (None, None)
    copy = {"what": "copy", "gigabytes_per_second": 2500.0}
    add_shares(sections | {"ceilings": {"status": "done", "rows": [copy]}})
    assert bar(sections, name) == (0.8, True)


def test_not_a_number_meets_no_bar():
    error = {"y": 1e-3, "x_grad": math.nan, "table_grad": 1e-3}
    rows = [{"dtype": "bfloat16", "relative_error": error, "repeats": True}]
    sections = {"numerics": {"status": "done", "rows": [*rows, *rows]}}
    figure, met = bar(sections, "relative error, bfloat16")
    assert math.isnan(figure)
    assert met is False
    assert bar(sections, "relative error, float16") == (None, None)


def run(monkeypatch, tmp_path, sections, seconds=60.0):
    """What sections leave in the file, and whether the process may go on."""
    from benchmarks.gpu import sections as gpu_sections
    from benchmarks.gpu.timing import Bench

    monkeypatch.setattr(gpu_sections, "SECTIONS", sections)
    document = {"sections": {}}
    deadline = time.monotonic() + seconds
    output = tmp_path / "gpu.json"
    usable = gpu_sections.run_sections(list(sections), Bench.smoke(), document, output, deadline)
    return json.loads(output.read_text())["sections"], usable


def test_what_fails_or_is_missing_is_recorded_and_the_rest_goes_on(monkeypatch, tmp_path):
    from benchmarks.gpu.operands import Task, UnavailableError
    from benchmarks.gpu.sections import Section

    def raises():
        raise RuntimeError("out of resources")

    def unavailable(bench):
        raise UnavailableError("nothing to compare with")

    tasks = [Task("bad", raises), Task("good", lambda: {"value": 1})]
    sections = {
        "mixed": Section(lambda bench: tasks, 0),
        "absent": Section(unavailable, 0),
        "long": Section(lambda bench: tasks, 1000),
        "last": Section(lambda bench: tasks[1:], 0),
    }
    found, usable = run(monkeypatch, tmp_path, sections)
    assert usable
    assert found["mixed"]["status"] == "failed"
    assert found["mixed"]["errors"] == [{"task": "bad", "error": "RuntimeError: out of resources"}]
    assert found["mixed"]["rows"] == [{"value": 1}]
    assert found["absent"]["status"] == "not run: nothing to compare with"
    assert found["long"]["status"] == "not run: out of time"
    assert found["last"]["status"] == "done"


def test_a_section_stops_between_tasks_when_time_is_up(monkeypatch, tmp_path):
    from benchmarks.gpu.operands import Task
    from benchmarks.gpu.sections import Section

    def slow():
        time.sleep(0.6)
        return {"value": 1}

    tasks = [Task(str(number), slow) for number in range(3)]
    found, _ = run(monkeypatch, tmp_path, {"s": Section(lambda bench: tasks, 0)}, seconds=0.5)
    assert found["s"]["status"] == "cut short: out of time after 1 of 3"
    assert found["s"]["rows"] == [{"value": 1}]


def test_a_process_that_died_is_recorded_with_what_it_was_doing(tmp_path):
    from benchmarks.gpu import __main__ as gpu

    output = tmp_path / "gpu.json"
    sections = forward(**{"14336x4096": 3.0})
    sections["forward"] |= {"status": "running", "running": "4096x4096", "errors": []}
    output.write_text(json.dumps({"sections": sections}))
    gpu._close(output, ["forward", "block"], -6)
    (section,) = json.loads(output.read_text())["sections"].values()
    assert section["status"] == "failed"
    assert section["rows"] == sections["forward"]["rows"]
    assert section["errors"] == [{"task": "4096x4096", "error": "the process ended with code -6"}]
    gpu._close(output, ["block"], 1)  # it could not even begin
    assert json.loads(output.read_text())["sections"]["block"]["status"] == "failed"


@pytest.mark.parametrize("name", ["published, in torch", "published, with our kernels"])
def test_the_published_runtime_computes_the_same_layer(name):
    from benchmarks.gpu.published import STEPS, published_linear

    generator = torch.Generator().manual_seed(0)
    index_map = torch.randint(0, 256, (6, 32), dtype=torch.uint8, generator=generator)
    x, table, y_grad = (
        torch.randn(shape, generator=generator) for shape in ((3, 64), (6, 4, 16), (3, 6))
    )
    results = []
    for product in (lut_linear, lambda *args: published_linear(*args, STEPS[name])):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, table)]
        y = product(leaves[0], index_map, leaves[1])
        results.append([y, *torch.autograd.grad(y, leaves, y_grad)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_tuning_finds_the_fastest_tile_and_lists_what_cannot_be_used(monkeypatch):
    from benchmarks.gpu import tune
    from benchmarks.gpu.tiles import Search
    from benchmarks.gpu.timing import Bench

    costs = {1: 4.0, 2: 1.0, 3: 2.0}

    def trial(choice):
        if choice["stages"] == 5:
            raise RuntimeError("out of shared memory")
        wrong = float(choice["stages"] == 4)
        return {"default": [lambda: torch.ones(1)], "tried": [lambda: torch.ones(1) + wrong]}

    def compare(self, contestants):
        return {"default": {"p50": costs[3]}, "tried": {"p50": costs[stages.pop(0)]}}

    stages = [1, 2]  # in the order in which they are tried; 3 is where the search begins
    monkeypatch.setattr(Bench, "compare", compare)
    about = Search({"stages": (1, 2, 3, 4, 5)}, {"stages": 3}, [trial])
    found = tune.search(Bench.smoke(), about, time.monotonic() + 60)
    assert found["best"] == {"stages": 2}
    assert found["speedup"] == pytest.approx(2.0)
    assert "another result" in found["tried"]["stages=4"]
    assert found["tried"]["stages=5"] == "RuntimeError: out of shared memory"


def test_plotting_without_figures_says_why(tmp_path):
    from benchmarks.gpu import roofline
    from benchmarks.shared.drawing import PlotError

    with pytest.raises(PlotError, match="does not exist: `make gpu` writes it"):
        roofline.read(tmp_path / "gpu.json")
    (tmp_path / "gpu.json").write_text('{"smoke": true}')
    with pytest.raises(PlotError, match="smoke run and holds no figures"):
        roofline.read(tmp_path / "gpu.json")
