"""What runs in place of GPU kernels that fail their check, and what is kept of it."""

import json
import stat
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from helpers.planted_kernels import Backends, kernels, uncompiled, wrong
from helpers.sketches import random_sketch
from spallm_kernels import choose_backend, dispatch, fallback, lut_linear, operators, verdicts
from spallm_kernels.dispatch import choose_column_backend
from spallm_kernels.fallback import check_device, first_passing
from spallm_kernels.self_check import find_fault

ON_GPU = torch.cuda.is_available()
CPU = torch.device("cpu")
WORDS = "Test GPU (capability 9.0), Triton 3.6.0, torch 2.11.0"
BOTH = ("triton", "portable")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The file of verdicts, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SPALLM_GPU_CHECK", raising=False)
    monkeypatch.setattr(fallback, "describe_device", lambda device: WORDS)
    fallback._decide.cache_clear()
    yield tmp_path / "spallm-convert" / "gpu-check.json"
    fallback._decide.cache_clear()


def choose(backends, device=CPU, bits=4):
    """Choose as a new process would."""
    fallback._decide.cache_clear()
    return first_passing(device, bits, BOTH, backends)


@pytest.mark.parametrize(
    ("hip", "words"),
    [
        (None, "Test GPU (capability 9.0), Triton 3.6.0, torch 2.11.0"),
        ("6.4", "Test GPU (gfx942:sramecc+), Triton 3.6.0, torch 2.11.0"),
    ],
)
def test_what_a_verdict_depends_on(monkeypatch, hip, words):
    properties = SimpleNamespace(name="Test GPU", major=9, minor=0, gcnArchName="gfx942:sramecc+")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6.0"))
    assert verdicts.describe_device(torch.device("cuda", 0)) == words
    assert verdicts.key_of(words, "triton", 4) != verdicts.key_of(words, "portable", 4)


def test_the_fastest_backend_that_passes_is_chosen():
    right, broken = kernels(), kernels(decode=uncompiled)
    backends = Backends(triton=right, portable=right)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(backends) == "triton"
    assert set(backends.ran) == {"triton"}
    with pytest.warns(RuntimeWarning, match="slower backend 'portable'"):
        assert choose(Backends(triton=broken, portable=right), bits=3) == "portable"
    with pytest.warns(RuntimeWarning, match="slow reference code"):
        assert (
            choose(Backends(triton=broken, portable=kernels(decode=wrong)), bits=2) == "reference"
        )


def test_one_warning_names_device_versions_kernel_and_error():
    backends = Backends(triton=kernels(decode=uncompiled), portable=kernels())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            first_passing(CPU, 4, BOTH, backends)
    (message,) = [str(warning.message) for warning in caught]
    assert message == (
        "sketched layers run on the slower backend 'portable': GPU kernels failed their check on "
        f"{WORDS}: 'triton' failed in decode of 1 token, 4 bits, bfloat16: RuntimeError: ptxas "
        "fatal : unknown instruction 'prmt'; `spallm-convert doctor` checks again, "
        "SPALLM_GPU_CHECK=0 turns the check off"
    )


def test_a_backend_that_cannot_be_imported_fails():
    def load(name):
        if name == "triton":
            raise ImportError("libcuda.so.1: cannot open shared object file")
        return kernels()

    with pytest.warns(RuntimeWarning, match="'triton' failed in ImportError: libcuda.so.1"):
        assert first_passing(CPU, 4, BOTH, load) == "portable"


def test_verdicts_are_kept_for_later_processes(cache):
    backends = Backends(triton=kernels(decode=wrong), portable=kernels())
    for number in range(2):
        with pytest.warns(RuntimeWarning, match="relative error 0.0"):
            assert choose(backends) == "portable"
        assert len(backends.ran) == 3, number  # one layer of the wrong backend, two of the right
    document = json.loads(cache.read_bytes())
    faults = {key.rpartition("; ")[2]: fault for key, fault in document["verdicts"].items()}
    assert faults["portable, 4 bits"] is None
    assert faults["triton, 4 bits"].startswith("decode of 1 token, 4 bits, bfloat16")
    assert all(key.startswith(f"{WORDS}; kernels ") for key in document["verdicts"])
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600
    assert list(cache.parent.iterdir()) == [cache]


def test_an_exception_is_no_verdict(cache):
    """A missing compiler may be installed: the next process tries again."""
    right = kernels()
    with pytest.warns(RuntimeWarning, match="unknown instruction"):
        assert choose(Backends(triton=kernels(decode=uncompiled), portable=right)) == "portable"
    assert [*json.loads(cache.read_bytes())["verdicts"].values()] == [None]
    assert choose(Backends(triton=right, portable=right)) == "triton"
    assert len(json.loads(cache.read_bytes())["verdicts"]) == 2
    faults = check_device(CPU, 4, BOTH, Backends(triton=kernels(decode=uncompiled), portable=right))
    assert [*faults] == ["triton", "portable"]
    assert len(json.loads(cache.read_bytes())["verdicts"]) == 1  # what was right is no more


def test_another_device_version_kernel_or_width_is_checked_again(monkeypatch):
    backends = Backends(triton=kernels())

    def is_checked(bits=4):
        before = len(backends.ran)
        assert choose(backends, bits=bits) == "triton"
        return len(backends.ran) > before

    assert is_checked()
    assert not is_checked()
    assert is_checked(bits=3)
    monkeypatch.setattr(verdicts, "_digest", lambda: "other kernels")
    assert is_checked()
    monkeypatch.setattr(fallback, "describe_device", lambda device: "another GPU")
    assert is_checked()
    monkeypatch.setattr(verdicts, "_digest", lambda: None)  # the source cannot be read
    assert is_checked()
    assert is_checked()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"format": 1}',
        b'{"format": 1, "verdicts": [null]}',
        b'{"format": 2, "verdicts": {"KEY": null}}',
        b'{"format": 1, "verdicts": {"KEY": 0}}',
        b'{"format": 1, "verdicts": {"KEY": null}}' + b" " * (1 << 20),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_and_replaced(cache, content):
    key = verdicts.key_of(WORDS, "triton", 4)
    cache.parent.mkdir()
    cache.write_bytes(content.replace(b"KEY", key.encode()))
    backends = Backends(triton=kernels())
    assert choose(backends) == "triton"
    assert backends.ran == ["triton", "triton"]
    assert json.loads(cache.read_bytes())["verdicts"] == {key: None}


@pytest.mark.parametrize(
    "place", ["a file in place of the folder", "a folder in place of the file"]
)
def test_a_cache_that_cannot_be_written_is_ignored(cache, place):
    if place.startswith("a file"):
        cache.parent.write_text("")
    else:
        cache.mkdir(parents=True)
    for _ in range(2):
        backends = Backends(triton=kernels())
        assert choose(backends) == "triton"
        assert backends.ran


def test_without_a_home_nothing_is_kept(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(verdicts.Path, "home", homeless)
    assert choose(Backends(triton=kernels())) == "triton"


def test_the_file_is_whole_while_many_write(cache):
    def write(number):
        verdicts.keep_verdict(f"key {number % 40}", None)
        return number % 40 == 39 or json.loads(cache.read_bytes())["format"] == 1

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write, range(200)))
    assert list(cache.parent.iterdir()) == [cache]


def test_old_verdicts_are_dropped(cache):
    for number in range(verdicts._MOST_VERDICTS + 3):
        verdicts.keep_verdict(f"key {number}", None)
    kept = list(verdicts.read_verdicts())
    assert len(kept) == verdicts._MOST_VERDICTS
    assert kept[0] == "key 3"


def test_the_switch_turns_the_check_off(monkeypatch, cache):
    monkeypatch.setenv("SPALLM_GPU_CHECK", "0")
    backends = Backends(triton=kernels(decode=wrong), portable=kernels())
    assert choose(backends) == "triton"
    assert backends.ran == []
    assert not cache.exists()
    monkeypatch.setenv("SPALLM_GPU_CHECK", "1")
    with pytest.warns(RuntimeWarning):
        assert choose(backends) == "portable"


def test_interpreted_kernels_are_not_checked(cache):
    backends = Backends(triton=kernels(INTERPRETED=True, decode=uncompiled))
    assert choose(backends) == "triton"
    assert not cache.exists()


def test_no_check_runs_in_a_captured_graph_or_a_traced_function(monkeypatch, cache):
    backends = Backends(triton=kernels(decode=wrong), portable=kernels())
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert first_passing(torch.device("cuda", 0), 4, BOTH, backends) == "triton"
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert first_passing(CPU, 4, BOTH, backends) == "triton"
    assert backends.ran == []
    assert not cache.exists()
    with pytest.warns(RuntimeWarning):
        assert first_passing(CPU, 4, BOTH, backends) == "portable"


def test_a_kept_verdict_holds_in_a_captured_graph(monkeypatch):
    cuda = torch.device("cuda", 0)
    verdicts.keep_verdict(verdicts.key_of(WORDS, "triton", 4), "decode: wrong")
    verdicts.keep_verdict(verdicts.key_of(WORDS, "portable", 4), None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(RuntimeWarning, match="'triton' failed in decode: wrong"):
        assert choose(Backends(triton=kernels(), portable=kernels()), cuda) == "portable"


def test_a_compiled_layer_chooses_its_backend_when_it_runs(monkeypatch):
    """Layers are single nodes to torch.compile, so a first call needs no eager call before it."""
    tracing = []
    original = operators.choose_backend

    def spy(*arguments):
        tracing.append(torch.compiler.is_compiling())
        return original(*arguments)

    monkeypatch.setattr(operators, "choose_backend", spy)
    sketch = random_sketch(4, 2, 8, 64, dtype=torch.float32)
    table = sketch.table.float()
    compiled = torch.compile(
        lambda x: lut_linear(x, sketch.index_map, table), backend="aot_eager", fullgraph=True
    )
    compiled(torch.ones(2, 64))
    assert tracing == [False]


def test_too_little_memory_is_no_verdict(cache):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert choose(Backends(triton=kernels(decode=full), portable=kernels())) == "triton"
    assert not cache.exists()
    with pytest.raises(torch.OutOfMemoryError):
        check_device(CPU, 4, BOTH, Backends(triton=kernels(decode=full)))


def test_a_kernel_that_brings_the_device_down_is_not_tried_again(monkeypatch):
    """CUDA refuses all work of a process after a bad access; only the next process goes on."""

    def lost(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    backends = Backends(triton=kernels(decode=lost), portable=kernels())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "ones", lost)
        with pytest.raises(RuntimeError, match="this process cannot use cpu any more; start it"):
            choose(backends)
    with pytest.warns(RuntimeWarning, match="illegal memory access"):
        assert choose(backends) == "portable"
    assert backends.ran == ["triton", "portable", "portable"]


def test_checking_again_ignores_what_is_kept():
    broken, right = kernels(decode=wrong), kernels()
    with pytest.warns(RuntimeWarning):
        assert choose(Backends(triton=broken, portable=right)) == "portable"
    backends = Backends(triton=right, portable=right)
    assert check_device(CPU, 4, BOTH, backends) == {"triton": None}
    assert choose(backends) == "triton"


@pytest.fixture
def gpu(monkeypatch):
    """A function that plants backends for a device that needs nothing more."""

    def plant(**planted):
        monkeypatch.setattr(dispatch, "_why_not_triton", lambda *call: None)
        monkeypatch.setattr(dispatch, "load_decoder", Backends(**planted))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(
            fallback, "find_fault", lambda k, device, bits: find_fault(k, CPU, bits)
        )
        monkeypatch.setattr(fallback, "_is_lost", lambda device: False)
        return torch.device("cuda", 0)

    return plant


def test_dispatch_takes_what_passes_and_what_is_asked_for(gpu):
    device = gpu(triton=kernels(decode=wrong), portable=kernels())
    with pytest.warns(RuntimeWarning, match="slower backend 'portable'"):
        assert choose_backend(device) == "portable"
    assert choose_backend(device, backend="triton") == "triton"
    assert choose_column_backend(device, 16) == "torch"


def test_columns_run_on_triton_where_its_kernels_pass(gpu):
    device = gpu(triton=kernels())
    assert choose_column_backend(device, 16) == choose_backend(device) == "triton"


def test_amd_gpus_get_the_portable_kernels(monkeypatch, gpu):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    device = torch.device("cuda", 0)
    dispatch._why_not_triton.cache_clear()
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, found an AMD GPU; use backend"):
        choose_backend(device, backend="triton")
    dispatch._why_not_triton.cache_clear()
    assert choose_backend(gpu(triton=kernels(), portable=kernels())) == "portable"
    assert choose_column_backend(device, 16) == "torch"
