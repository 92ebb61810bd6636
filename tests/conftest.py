"""Fixtures that many tests share, compiler caches that follow the sources, Triton without a GPU.

numba keys its cache on the file of a function, not on the files of what it calls: after an edit to
a callee the cached caller would still run the old code. So tests cache below a name that is a hash
of all kernels.
"""

import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path

_TESTS = Path(__file__).parent
_ROOT = _TESTS.parent
_SOURCES = sorted([*_ROOT.glob("kernels/**/*.py"), *_ROOT.glob("formats/**/*.py")])
_DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:16]
os.environ["NUMBA_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"spallm-numba-{_DIGEST}")
# Several processes of tests share the cores: threads that spin while they wait keep others off.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_SHARE = (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _SHARE)))

import pytest  # noqa: E402
import torch  # noqa: E402

# Read when kernels are defined. Tests that compile instead do so in a process of their own.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from helpers.calibration import save_source, save_text  # noqa: E402
from helpers.tiny_models import TinyModel, save_tiny_llama  # noqa: E402
from helpers.tiny_tokenizer import tiny_tokenizer  # noqa: E402
from spallm_convert import SketchConfig, convert  # noqa: E402

#: Files that take more than half a minute, the longest first. If one came last, it would run alone.
_LONGEST = (
    "fuzz/test_fuzz.py",
    "kernels/test_compiled.py",
    "conversion/test_kills.py",
    "kernels/test_portable.py",
    "cli/test_demo.py",
    "runtime/test_processes.py",
    "source/test_hub.py",
    "test_docs.py",
    "calibration/test_calibrate.py",
    "benchmarks/test_finetune.py",
    "calibration/test_resume.py",
    "cli/test_eval.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Keep pytest-xdist from starting with the files that have the most tests."""
    if hasattr(config.option, "loadscopereorder"):  # since pytest-xdist 3.8
        config.option.loadscopereorder = False


#: Tests with vLLM's engine have an environment of their own: `make test-vllm`.
collect_ignore = [] if importlib.util.find_spec("vllm") else ["engine"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first. SPALLM_TEST_SHARD=k/n leaves every n-th test: `make gpu` runs n
    processes, as compiling kernels takes most of the time."""
    ranks = {_TESTS / name: rank for rank, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    number, shards = map(int, os.environ.get("SPALLM_TEST_SHARD", "0/1").split("/"))
    items[:] = items[number::shards]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> TinyModel:
    """One shard, bf16, with biases."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def sharded_llama(tmp_path_factory) -> TinyModel:
    """Several shards."""
    return save_tiny_llama(tmp_path_factory.mktemp("sharded-llama"), max_shard_size="60KB")


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A model to calibrate, with a tokenizer."""
    return save_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """To calibrate it on."""
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory) -> dict[str, Path]:
    """A tiny dense checkpoint with a tokenizer, and its sketch, to evaluate."""
    root = tmp_path_factory.mktemp("evaluated")
    save_tiny_llama(root / "dense", initializer_range=0.2)
    tiny_tokenizer().save_pretrained(root / "dense")
    convert(root / "dense", root / "sketched", SketchConfig(effort="fast", bits=3))
    return {kind: root / kind for kind in ("dense", "sketched")}


@pytest.fixture
def write(tmp_path):
    """A function that writes a file, text or bytes, and returns its path as a string."""

    def file(name, content):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8")
        return str(path)

    return file
