"""The benchmarks of the CPU backend: what they time, what follows from it, what the page shows."""

import json
import stat
import sys

import pytest
import torch
from click.testing import CliRunner

from benchmarks.cpu import affine, generate, linear, linear_turns, tenants, training, turns
from benchmarks.cpu.bars import judged
from benchmarks.cpu.generate_parts import Parts
from benchmarks.cpu.tables import PAGE, TABLES, replaced
from benchmarks.quality import llamacpp
from benchmarks.shared.machine import RESULTS, Load
from helpers.calibration import save_source
from spallm_kernels import lut_linear
from spallm_kernels.cpu.vector_units import PORTABLE, host_unit
from spallm_kernels.reference.linear import dequantize, table_grad

#: Judged by the files' own figures below.
JUDGES = {
    "linear": lambda document: linear.judge(document["units"][0]),
    "amx": lambda document: linear.judge(document["units"][0]),
    "generate": lambda document: generate.judge(document["speeds"]),
    "training": lambda document: training.judge(document["results"]),
    "tenants": lambda document: tenants.judge(document["rows"]),
    "affine": lambda document: affine.judge(document["groups_per_row"]),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_page_shows_the_tables_of_the_results(name):
    file, tables = TABLES[name]
    page = PAGE.read_text()
    for table in tables(json.loads((RESULTS / file).read_text())):
        assert table in page
        assert replaced(page, table) == page


def test_a_table_is_replaced_by_its_first_column():
    page = "Text.\n\n| a | b |\n| --- | ---: |\n| 1 | 2 |\n\n| ab | c |\n"
    assert replaced(page, "| a | c |\n| 3 |") == "Text.\n\n| a | c |\n| 3 |\n\n| ab | c |\n"
    with pytest.raises(ValueError, match=r"0 tables that begin with '\| b \|'"):
        replaced(page, "| b | c |")


@pytest.mark.parametrize("name", TABLES)
def test_the_verdicts_follow_from_the_figures_of_the_same_file(name):
    document = json.loads((RESULTS / TABLES[name][0]).read_text())
    assert JUDGES[name](document) == document["bars"]


def test_contestants_take_turns_and_the_first_turns_are_not_counted(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(clock))
    calls = []

    def slow(turn):
        calls.append(("slow", turn))
        if turn < turns.WARM_UP:
            [next(clock) for _ in range(50)]
        next(clock)

    found = turns.milliseconds({"slow": slow, "fast": lambda turn: calls.append(("fast", turn))}, 2)
    # Each is called twice in a row, and the second call is timed.
    assert calls == [
        (name, each) for turn in range(4) for name in ("slow", "fast") for each in (turn + 1, turn)
    ]
    assert found["milliseconds"]["slow"] == {"p20": 2000.0, "p50": 2000.0, "p80": 2000.0}
    assert turns.ratio(found, "slow", "fast") == 2


def test_the_load_of_other_processes_leaves_out_this_one(monkeypatch):
    now = iter([(100.0, 10.0, 0.0), (130.0, 20.0, 20.0)])
    monkeypatch.setattr(Load, "_now", lambda self: next(now))
    monkeypatch.setattr("benchmarks.shared.machine.os.cpu_count", lambda: 2)
    # 30 s on 2 cores within 20 s, of which 10 s were ours.
    assert Load().elsewhere() in (0.5, None)


def test_every_contestant_computes_what_its_name_says():
    operands = linear_turns.Operands(256, 4)
    first = operands.sketch(3, 0)
    assert not torch.equal(first[0], operands.sketch(3, 1)[0])
    torch.manual_seed(1)
    product = operands.sketched(torch.float32, 2, 3)
    torch.manual_seed(1)
    assert torch.equal(product(0), lut_linear(torch.randn(2, 256), *first))
    torch.manual_seed(1)
    calls = linear_turns._gradients(operands, torch.float32, 8)
    torch.manual_seed(1)
    _, y_grad = (operands.inputs(torch.float32, 8) for _ in range(2))
    codes, table = operands.sketch(4, 0)
    weight = dequantize(codes, table.float(), 256)
    torch.testing.assert_close(calls["sketch, inputs"](0), y_grad @ weight, rtol=1e-4, atol=1e-3)
    weight_grad = calls["dense, weight"](0)
    torch.testing.assert_close(
        calls["sketch, tables"](0),
        table_grad(weight_grad, codes, table.float()),
        rtol=1e-4,
        atol=1e-3,
    )
    assert torch.equal(calls["dense, inputs"](0), y_grad @ operands.dense[torch.float32][0])


def test_a_unit_is_measured_and_judged():
    found = linear_turns.measure(
        256, 4, turns=1, tokens=[1, 8, 32, 128, 512], widths=[4, 3, 2], many=[8], around=[2, 4]
    )
    unit = host_unit()
    assert found["unit"] == (PORTABLE if unit is None else unit.name)
    sections = [row["section"] for row in found["rows"]]
    assert sections == [
        *["products"] * 5,
        "widths",
        "dequantize",
        *["gradients"] * 2,
        *["paths"] * 8,
    ]
    bars = linear.judge(found)
    assert len(bars) == 10
    document = {"units": [found], "bars": bars}
    assert all(table.count("\n") > 1 for table in TABLES["linear"][1](document))
    most = linear.most_decoded(found)
    assert [(row["inputs"], row["hashed"]) for row in most] == [
        (inputs, hashed) for inputs in ("float32", "bfloat16") for hashed in (False, True)
    ]


def test_tenants_are_measured_and_judged():
    calls = tenants.contestants(4, 1, torch.float32, 64)
    assert torch.equal(calls[tenants.LAYER](0), calls[tenants.ONE](0))
    assert torch.equal(calls[tenants.MIXED](0), calls[tenants.LOOP](0))
    row = tenants.measure(4, 1, torch.float32, 64, turns=1)
    bars = tenants.judge([row, row | {"bits": 3}])
    assert [bar["figure"] for bar in bars] == [tenants.slower(row)]
    tables = TABLES["tenants"][1]({"rows": [row], "bars": bars})
    assert all(table.count("\n") > 1 for table in tables)
    times = {"16 sets": 4.0, "reading tables": 1.0, "one set": 2.0}
    assert tenants.slower({"milliseconds": {n: {"p50": t} for n, t in times.items()}}) == 1.5


def path_row(tokens, decode, dense):
    times = {"decode": {"p50": decode}, "dense": {"p50": dense}}
    about = {"section": "paths", "inputs": "float32", "hashed": False, "tokens": tokens}
    return about | {"milliseconds": times}


@pytest.mark.parametrize(
    ("times", "most"), [([(1, 2), (2, 2), (3, 2), (1, 2)], 16), ([(3, 2)], None)]
)
def test_the_decode_path_serves_tokens_up_to_where_it_is_slower(times, most):
    rows = [path_row(8 * (1 + number), *pair) for number, pair in enumerate(times)]
    assert linear.most_decoded({"rows": rows[::-1]})[0]["tokens"] == most


@pytest.mark.parametrize(("sign", "met"), [(">=", False), ("<=", True)])
def test_a_bar_is_met_on_the_right_side(sign, met):
    assert judged("name", sign, 1.5, 1.4)["met"] is met
    assert judged("name", sign, 1.5, 1.5)["met"]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Programs of llama.cpp that write what they are called with."""
    folder = tmp_path / "llama.cpp"
    (folder / "build/bin").mkdir(parents=True)
    lines = {
        "llama-quantize": "import shutil; shutil.copy(sys.argv[2], sys.argv[3])",
        "llama-bench": 'print("loading", file=sys.stderr); print(\'[{"avg_ts": 12.5}]\')',
    }
    for name, line in lines.items():
        path = folder / "build/bin" / name
        version = 'if "--version" in sys.argv: print("version: 3 (b)"); sys.exit()'
        log = f'open(r"{folder}/{name}.txt", "a").write(" ".join(sys.argv[1:]) + "\\n")'
        path.write_text(f"#!{sys.executable}\nimport sys\n{version}\n{log}\n{line}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(llamacpp.FOLDER, str(folder))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("model") / "model")


def test_models_and_llamacpp_generate_in_turns(tmp_path, model, programs, monkeypatch):
    source = tmp_path / "model.gguf"
    source.write_bytes(b"weights")
    monkeypatch.setattr(generate, "demo_model", lambda: source)
    monkeypatch.setattr(generate, "dense_folder", lambda *_: model)
    monkeypatch.setattr(generate, "model_name", lambda _: "tiny")
    output, cache = tmp_path / "generate.json", tmp_path / "cache"
    options = ["--tokens", "6", "--turns", "2", f"--cache={cache}", f"--output={output}"]
    result = CliRunner().invoke(generate.main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    document = json.loads(output.read_text())
    assert document["versions"]["llama.cpp"] == "3 (b)"
    names = [f"{kind} {dtype}" for dtype in ("float32", "bfloat16") for kind in ("dense", "sketch")]
    assert {*names, "llama.cpp Q4_0", "llama.cpp Q4_K_M"} < document["speeds"].keys()
    assert all(len(row["tokens_per_second"]) == 2 for row in document["speeds"].values())
    assert document["medians"]["llama.cpp Q4_0"] == 12.5
    called = (programs / "llama-bench.txt").read_text().splitlines()
    threads = torch.get_num_threads()
    tail = f"-p 0 -n 6 -t {threads} -r 1 -o json"
    gguf = cache / "model-llama.cpp/Q4_0.gguf"
    assert called.count(f"-m {gguf} {tail}") == 2
    assert gguf.read_bytes() == b"weights"
    assert document["bars"] == generate.judge(document["speeds"])
    assert all(table.count("\n") > 1 for table in TABLES["generate"][1](document))


def test_without_llamacpp_the_models_are_compared(model, tmp_path, monkeypatch):
    monkeypatch.delenv(llamacpp.FOLDER, raising=False)
    monkeypatch.setattr(generate, "demo_model", lambda: tmp_path / "model.gguf")
    assert generate.llama_cpp(tmp_path) == {}


def test_parts_of_a_step_add_up(model, tmp_path):
    from spallm_convert import load_sketched

    sketch = load_sketched(generate.sketched(model, tmp_path, head=True)).eval()
    found = Parts(sketch).measure(4)
    assert 0 <= found["kernels of the layers"] < found["layers"]
    assert (found["kernels of the layers"] > 0) == (host_unit() is not None)
    assert all(found[name] > 0 for name in ("layers", "head", "rest"))
    assert sketch.forward.__name__ == "forward"
    assert "forward" not in vars(sketch)


def test_training_steps_are_compared_in_turn_and_alone(tmp_path, model, monkeypatch):
    from benchmarks.finetune import one_run
    from benchmarks.finetune.methods import MATCHED

    jobs = []

    def run_in_process(module, described, scratch):
        job = one_run.Job(**described | {"methods": tuple(described["methods"])})
        jobs.append((job.methods, job.steps, job.tokens))
        return json.loads(json.dumps((one_run.time_in_turn if job.in_turn else one_run.train)(job)))

    monkeypatch.setattr(training, "run_in_process", run_in_process)
    monkeypatch.setattr(training, "versions", lambda *_: {})
    monkeypatch.setattr(training, "COMPARED", ("full", MATCHED))
    output = tmp_path / "training.json"
    options = [f"--model={model}", f"--cache={tmp_path / 'cache'}", f"--output={output}"]
    options += ["--method=full", f"--method={MATCHED}", "--tokens=8", "--turns=2", "--batch-size=2"]
    result = CliRunner().invoke(training.main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert jobs == [
        (("full", MATCHED), 3, 8),
        (("full",), 3, 8),
        ((MATCHED,), 3, 8),
    ]
    document = json.loads(output.read_text())
    (row,) = document["results"]
    figure = row["methods"][MATCHED]["relative"]["p50"]
    assert document["bars"][0]["figure"] == figure
    assert document["bars"][0]["met"] == (figure >= 1)
    assert row["methods"][MATCHED]["trainable_parameters"] > 0
    assert row["methods"]["full"]["memory"]["peak_bytes"] > 0
    assert all(table.count("\n") > 1 for table in TABLES["training"][1](document))
