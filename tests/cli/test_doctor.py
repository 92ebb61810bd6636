"""`spallm-convert doctor`: what it prints, and its exit code if something is wrong.

A GPU is planted where one is needed: torch's answers about it, and the verdicts on its kernels.
"""

import json
import platform
from types import SimpleNamespace

import pytest
import torch

from spallm_convert import __version__
from spallm_convert.cli import main
from spallm_convert.runtime import diagnosis
from spallm_convert.runtime.throughput import Throughput
from spallm_kernels.cpu.vector_units import host_unit

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """The devices that were timed: timing takes seconds, and one test does it."""
    devices = []

    def measure(device):
        devices.append(str(device))
        return Throughput(
            device=str(device), sketched_ms=1.0, dense_float32_ms=4.0, dense_bfloat16_ms=2.0
        )

    monkeypatch.setattr(diagnosis, "measure", measure)
    return devices


@pytest.fixture
def gpu(monkeypatch):
    """A function that plants a GPU, the faults of its backends, and what it lacks."""

    def plant(faults, *, obstacle=None, chosen="triton"):
        properties = SimpleNamespace(name="Test GPU", major=9, minor=0, total_memory=80 * 10**9)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
        monkeypatch.setattr(diagnosis, "why_reference", lambda device, bits: obstacle)
        monkeypatch.setattr(diagnosis, "check_gpu", lambda device, bits: faults)

        def route(device, tokens):
            backend = "cpu" if device.type == "cpu" else chosen
            path = "decode" if tokens < 100 else "dense"
            return diagnosis.Route(device=str(device), tokens=tokens, backend=backend, path=path)

        monkeypatch.setattr(diagnosis, "_route", route)

    return plant


@NO_GPU
def test_a_machine_without_a_gpu_is_fine(run, measured):
    out = run("doctor")
    assert f"spallm-convert {__version__}, python {platform.python_version()}, torch " in out
    assert "\nno GPU\n" in out
    assert "cpu: backend 'cpu' checked with 2, 3, 4 bits: right" in out
    unit = host_unit()
    path = "portable" if unit is None else unit.name
    assert f"cpu: 1 token: backend 'cpu' ({path}), path 'decode'" in out
    assert f"cpu: 512 tokens: backend 'cpu' ({path}), path 'dense'" in out
    assert "cpu: a layer of 4096 x 4096, 4 bits, 1 token: 1 ms; dense 4 ms in float32, 2 ms" in out
    assert out.endswith("no problems found\n")
    assert measured == ["cpu"]


@NO_GPU
def test_json(run):
    found = json.loads(run("doctor", "--json"))
    assert found["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert found["cpu"]["path"] == diagnosis.cpu_path()
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["gpus"] == found["problems"] == []
    assert [check["bits"] for check in found["checks"]] == [2, 3, 4]
    assert [route["tokens"] for route in found["routes"]] == [1, 8, 512]
    assert found["throughput"][0]["dense_float32_ms"] == 4


def test_features_are_those_that_llvm_finds(monkeypatch):
    llvm = pytest.importorskip("llvmlite.binding")
    monkeypatch.setattr(llvm, "get_host_cpu_name", lambda: "znver4")
    has = {"avx2": True, "avx512f": False, "neon": False, "sse2": True}
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: has)
    assert diagnosis._cpu()["features"] == ["AVX2"]

    def unknown():
        raise RuntimeError("no such CPU")

    monkeypatch.setattr(llvm, "get_host_cpu_features", unknown)
    assert diagnosis._cpu()["name"] == platform.machine()


def test_kernels_that_are_right(run, gpu, measured):
    gpu({"triton": None})
    out = run("doctor")
    assert "cuda:0: Test GPU, capability 9.0, 80 GB" in out
    assert "cuda:0: backend 'triton' checked with 2, 3, 4 bits: right" in out
    assert "cuda:0: 1 token: backend 'triton', path 'decode'" in out
    assert measured == ["cpu", "cuda:0"]


def test_a_failing_check(run, gpu, capsys):
    gpu({"triton": "decode of 1 token: RuntimeError: ptxas", "portable": None}, chosen="portable")
    err = run("doctor", code=1)
    assert err == (
        "spallm-convert: cuda:0: kernels of backend 'triton' failed their check: decode of 1 "
        "token: RuntimeError: ptxas; install other versions of torch and Triton, then run this "
        "command again\n"
    )
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--json"])
    assert stopped.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert [problem.partition(":")[0] for problem in found["problems"]] == ["cuda"]
    faults = {check["backend"]: check["fault"] for check in found["checks"] if check["bits"] == 4}
    assert faults["portable"] is faults["cpu"] is None
    assert faults["triton"] == "decode of 1 token: RuntimeError: ptxas"


def test_slow_reference_code(run, gpu):
    gpu({}, obstacle="Triton is not installed: pip install 'spallm-convert[gpu]'")
    err = run("doctor", code=1)
    assert err == (
        "spallm-convert: cuda:0: sketched layers run on slow reference code: Triton is not "
        "installed: pip install 'spallm-convert[gpu]'\n"
    )
    gpu({}, obstacle="the Triton kernels need compute capability 8.0, found 7.5")
    assert "found 7.5; use the CPU or another GPU" in run("doctor", code=1)


def test_a_wrong_kernel_of_the_cpu(run, monkeypatch):
    """The real check of a planted backend: every weight is one place off."""
    real = diagnosis.load_decoder("cpu")

    def shifted(*arguments, **options):
        return real.dequantize(*arguments, **options).roll(1, 1)

    kernels = {name: getattr(real, name) for name in ("can_decode", "decode", "table_grad")}
    planted = SimpleNamespace(**kernels, dequantize=shifted)
    monkeypatch.setattr(diagnosis, "load_decoder", lambda name: planted)
    err = run("doctor", code=1)
    assert "cpu: kernels of backend 'cpu' failed their check: dequantize, 2 bits" in err
    assert "install other versions of numba" in err


def test_a_gpu_that_is_full_or_lost_is_a_problem(run, gpu, monkeypatch):
    gpu({})

    def full(device, bits):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 MiB")

    monkeypatch.setattr(diagnosis, "check_gpu", full)
    assert "cuda:0: CUDA out of memory. Tried to allocate 2 MiB; free it" in run("doctor", code=1)


def test_a_switched_off_check_is_said(run, gpu, monkeypatch):
    gpu({"triton": None})
    monkeypatch.setenv("SPALLM_GPU_CHECK", "0")
    assert "SPALLM_GPU_CHECK=0: outside of this command" in run("doctor")


@pytest.mark.slow
def test_a_layer_is_timed():
    from spallm_convert.runtime.throughput import measure

    speed = measure(torch.device("cpu"))
    assert speed.device == "cpu"
    assert min(speed.sketched_ms, speed.dense_float32_ms, speed.dense_bfloat16_ms) > 0.05
