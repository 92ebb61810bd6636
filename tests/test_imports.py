"""Rooms of the package: imports point down, nothing goes round, and few imports hide in functions.

Every import statement is resolved, those in functions and for type checkers included. Import-linter
checks the same layers; it knows neither files nor functions.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
HOMES = {
    "spallm_convert": ROOT,
    "spallm_formats": ROOT / "formats",
    "spallm_kernels": ROOT / "kernels",
}

#: Rooms of spallm_convert from top to bottom. Rooms of one floor do not import each other.
FLOORS = (
    ("cli", "serving"),
    ("conversion",),
    ("calibration", "evaluation"),
    ("sketch", "runtime"),
    ("source",),
    ("config", "devices", "hub_retries"),
    ("calibration_config", "hub_errors", "recipe"),
    ("effort",),
    ("errors", "paths", "progress", "version"),
)
#: Inside calibration; "" are the files that lie in no room of their own, which may import each
#: other.
CALIBRATION_FLOORS = (("healing", "allocation"), ("",), ("blocks",))

#: Packages whose names are imported when they are first used. For type checkers they import
#: everything, which nothing else may do.
FACES = {"spallm_convert", "spallm_kernels"}

#: Imports of our own in functions, outside of the command line, and why they are there.
IN_FUNCTIONS = {
    ("spallm_convert.runtime.conversions", "spallm_convert.runtime.stacking"): (
        "the loading code of transformers may be half imported when the quantizer is"
    ),
    ("spallm_convert.runtime.registration", "spallm_convert.runtime.adapters"): (
        "PEFT is optional, and importing the package must not import it"
    ),
    ("spallm_convert.runtime.registration", "spallm_convert.runtime.quantizer"): (
        "importing the package must not import transformers"
    ),
    **dict.fromkeys(
        [
            ("spallm_convert.serving", "spallm_formats"),
            *(
                ("spallm_convert.serving", f"spallm_convert.serving.{name}")
                for name in ("config", "loading", "manager", "server", "versions")
            ),
        ],
        "vLLM runs the plugin in every process, whatever it serves",
    ),
    **dict.fromkeys(
        [
            ("spallm_convert.runtime.sketch", "spallm_kernels"),
            ("spallm_convert.serving.labels", "spallm_kernels"),
        ],
        "vLLM for CPUs does not start if numba has been imported",
    ),
    ("spallm_formats.packing", "spallm_formats.bitstream"): "headers are read without numba",
    ("spallm_kernels.batched.compensate", "spallm_kernels.triton.compensate"): (
        "Triton is only there with NVIDIA GPUs"
    ),
    ("spallm_kernels.batched.descend", "spallm_kernels.triton.descend"): (
        "Triton is only there with NVIDIA GPUs"
    ),
}


class Import(NamedTuple):
    """An import of one of our modules by another."""

    importer: str
    imported: str
    in_function: bool


def _modules() -> dict[str, Path]:
    found = {}
    for package, home in HOMES.items():
        for path in (home / package).rglob("*.py"):
            parts = path.relative_to(home).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _imports(name: str) -> Iterator[Import]:
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for target in _targets(node, package):
            if target in MODULES:
                yield Import(name, target, in_function)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


def _targets(node: ast.AST, package: str) -> Iterator[str]:
    """The modules that a node imports, by their whole names."""
    match node:
        case ast.Import(names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module, names, level):
            parents = package.split(".")
            base = ".".join([*parents[: len(parents) - level + 1], *filter(None, [module])])
            for alias in names:
                inner = f"{base if level else module}.{alias.name}"
                yield inner if inner in MODULES else inner.rpartition(".")[0]
        case ast.Call(ast.Attribute(attr="import_module"), [ast.Constant(str(module))]):
            yield module


IMPORTS = [found for name in MODULES for found in _imports(name)]
#: Without those of the faces, which are for type checkers and users.
INNER = [found for found in IMPORTS if found.importer not in FACES]


def _room(module: str) -> str:
    """The room of a module of spallm_convert; "" of the package itself."""
    return module.split(".")[1] if "." in module else ""


def _circle(edges: set[tuple[str, str]]) -> list[str]:
    """Nodes of a circle, in order; none if there is none."""
    after: dict[str, list[str]] = {}
    for start, end in edges:
        after.setdefault(start, []).append(end)
    done: set[str] = set()

    def search(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for other in after.get(node, ()):
            if circle := search(other, [*way, node]):
                return circle
        done.add(node)
        return []

    return next(filter(None, (search(node, []) for node in sorted(after))), [])


def _ranks(floors: tuple[tuple[str, ...], ...]) -> dict[str, int]:
    return {room: number for number, floor in enumerate(floors) for room in floor}


def _upwards(edges: set[tuple[str, str]], ranks: dict[str, int]) -> list[tuple[str, str]]:
    return sorted((a, b) for a, b in edges if a != b and ranks[a] >= ranks[b])


def _in_package(package: str) -> list[Import]:
    start = package + "."
    return [i for i in INNER if i.importer.startswith(start) and i.imported.startswith(start)]


def test_no_circle_of_files():
    assert _circle({(i.importer, i.imported) for i in INNER}) == []


def test_a_circle_is_found():
    assert _circle({("a", "b"), ("b", "c"), ("c", "b")}) == ["b", "c", "b"]
    assert _circle({("a", "b"), ("b", "c"), ("a", "c")}) == []


def test_every_import_between_rooms_points_down():
    edges = {(_room(i.importer), _room(i.imported)) for i in _in_package("spallm_convert")}
    between = {(a, b) for a, b in edges if a != b}
    assert _upwards(between, _ranks(FLOORS)) == []
    assert _circle(between) == []
    assert {_room(name) for name in MODULES if name.startswith("spallm_convert.")} == {
        room for floor in FLOORS for room in floor
    }


def test_no_module_imports_the_face_of_the_package():
    """It would import everything above it."""
    assert [i.importer for i in INNER if i.imported == "spallm_convert"] == []


def test_every_import_inside_calibration_points_down():
    def room(module: str) -> str:
        _, _, *inner = module.split(".")
        names = [name for floor in CALIBRATION_FLOORS for name in floor]
        return inner[0] if inner[0] in names else ""

    found = _in_package("spallm_convert.calibration")
    edges = {(room(i.importer), room(i.imported)) for i in found}
    assert _upwards(edges, _ranks(CALIBRATION_FLOORS)) == []


@pytest.mark.parametrize("package", ["spallm_formats", "spallm_kernels"])
def test_formats_and_kernels_import_neither_each_other_nor_the_converter(package):
    others = {i.imported.split(".")[0] for i in IMPORTS if i.importer.split(".")[0] == package} - {
        package
    }
    assert others == set()


def test_imports_in_functions_are_few_and_known():
    found = {
        (i.importer, i.imported)
        for i in INNER
        if i.in_function and not i.importer.startswith("spallm_convert.cli")
    }
    assert found == IN_FUNCTIONS.keys()
