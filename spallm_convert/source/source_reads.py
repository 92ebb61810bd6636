"""Read the source of a module's class, and list its expressions that use another layer's weight."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

#: A test in the source, and whether it has to be true for the code to run.
Condition = tuple[ast.expr, bool]

#: Functions that fill or resize weights. They do not run on a model that is loaded.
_PREPARES = re.compile(r"(^|_)(re)?(init|initialize|reset|resize|resized|tie)(_|$)|__init__")
#: What may be asked of a weight without reading its numbers or their dtype.
_HARMLESS = {"device", "requires_grad", "is_cuda"}
_LIBRARY = ("torch.nn.modules.module", "transformers.modeling_utils", "transformers.generation")


@dataclass(frozen=True)
class Read:
    """Describe an expression that uses the weight of a submodule.

    Attributes:
        names: Path of the submodule from the variable. A star stands for an index.
        from_self: Whether the variable is `self`.
        function: Class and function that contain the expression.
        conditions: The tests around the expression.
        is_first_parameter: Whether the expression is the first parameter below the submodule.
    """

    names: tuple[str, ...]
    from_self: bool
    function: str
    conditions: tuple[Condition, ...]
    is_first_parameter: bool = False


def reads_of(module_class: type) -> tuple[Read, ...]:
    """List the expressions in a class and its parents that use the weight of a submodule.

    Functions that prepare weights, and those that no code in the same file calls, are left out. The
    functions of the file that belong to no class are read with each class.

    Args:
        module_class: The class of a module.

    Returns:
        The expressions. None are found in classes without a source file.
    """
    return _reads(_lineage(module_class))


def mode_tests(module_class: type) -> tuple[ast.expr | None, ...]:
    """List where a class uses `self.training` for more than to decide about such expressions.

    Args:
        module_class: The class of a module.

    Returns:
        The test of each `if` that does, and None for each use that is not in such a test.
    """
    return _mode_tests(_lineage(module_class))


def _lineage(module_class: type) -> tuple[tuple[str, str], ...]:
    """Return the Python module and the name of a class and its parents."""
    return tuple(
        (parent.__module__, parent.__name__)
        for parent in module_class.__mro__
        if parent is not object and not parent.__module__.startswith(_LIBRARY)
    )


@lru_cache(maxsize=1024)
def _reads(lineage: tuple[tuple[str, str], ...]) -> tuple[Read, ...]:
    found: list[Read] = []
    for file, tree in _trees(lineage).items():
        called = _names(file)
        for name, definition in tree:
            found += _reads_in(definition.body, name + ".", called)
        found += _reads_in(_parsed(file).body, "", called)
    return tuple(found)


@lru_cache(maxsize=1024)
def _mode_tests(lineage: tuple[tuple[str, str], ...]) -> tuple[ast.expr | None, ...]:
    decided = {id(test) for read in _reads(lineage) for test, _ in read.conditions}
    definitions = [d for tree in _trees(lineage).values() for _, d in tree]
    nodes = [node for definition in definitions for node in ast.walk(definition)]
    tests = [node.test for node in nodes if isinstance(node, ast.If | ast.IfExp)]
    inside = {id(part): test for test in tests for part in ast.walk(test)}
    uses = [inside.get(id(node)) for node in nodes if chain(node) == ("self", "training")]
    return tuple(test for test in uses if id(test) not in decided)


def _trees(
    lineage: tuple[tuple[str, str], ...],
) -> dict[str, list[tuple[str, ast.ClassDef]]]:
    """Return the names and definitions of classes, by Python module."""
    found: dict[str, list[tuple[str, ast.ClassDef]]] = {}
    for file, name in lineage:
        for node in ast.walk(_parsed(file)):
            if isinstance(node, ast.ClassDef) and node.name == name:
                found.setdefault(file, []).append((name, node))
    return found


@lru_cache(maxsize=256)
def _parsed(module_name: str) -> ast.Module:
    """Return the syntax tree of a Python module; an empty one if it cannot read weights."""
    try:
        file = inspect.getsourcefile(sys.modules[module_name])
        source = Path(file or "").read_text(encoding="utf-8")
    except (KeyError, TypeError, OSError, UnicodeDecodeError):  # built in, or typed in
        source = ""
    return ast.parse(source if ".weight" in source or ".parameters()" in source else "")


@lru_cache(maxsize=256)
def _names(module_name: str) -> set[str]:
    """Return every name that the code of a Python module uses."""
    tree = _parsed(module_name)
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return attributes | {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _reads_in(body: list[ast.stmt], prefix: str, called: set[str]) -> Iterator[Read]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        runs = node.name in called or hasattr(nn.Module, node.name)
        if runs and not _PREPARES.search(node.name):
            for statement in node.body:
                yield from _walk(statement, (), prefix + node.name, ())


def _walk(
    node: ast.AST, above: tuple[ast.AST, ...], function: str, conditions: tuple[Condition, ...]
) -> Iterator[Read]:
    """Yield the reads below a node of the syntax tree; `above` are the nodes that contain it."""
    weight, parameters = _names_of_weight(node), _names_of_parameters(node)
    if weight and not _is_harmless(above):
        yield Read(weight[1:], weight[0] == "self", function, conditions)
    if parameters and not _is_harmless(above[:-1]):
        yield Read(parameters[1:], True, function, conditions, is_first_parameter=True)
    inside = (*above, node)
    if isinstance(node, ast.If | ast.IfExp):
        # If the test is false, nothing that it compares has an effect.
        met, unmet = (*conditions, (node.test, True)), (*conditions, (node.test, False))
        yield from _walk(node.test, inside, function, met)
        for branch, holds in ((node.body, met), (node.orelse, unmet)):
            children: list[ast.AST] = [*branch] if isinstance(branch, list) else [branch]
            for child in children:
                yield from _walk(child, inside, function, holds)
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, inside, function, conditions)


def _names_of_weight(node: ast.AST) -> tuple[str, ...]:
    """Return ("self", "a", "b") for self.a.b.weight; empty for all else, also for self.weight."""
    if isinstance(node, ast.Attribute) and node.attr == "weight":
        names = chain(node.value)
        # `layers[0].weight` says nothing about the layer if `layers` is not of `self`.
        known = len(names) > 1 and (names[0] == "self" or names[-1] != "*")
        return names if known else ()
    return ()


def _names_of_parameters(node: ast.AST) -> tuple[str, ...]:
    """Return ("self", "a") for self.a.parameters(), empty for all else."""
    match node:
        case ast.Call(func=ast.Attribute(attr="parameters", value=value), args=[]):
            names = chain(value)
            return names if names[:1] == ("self",) and "*" not in names else ()
    return ()


def _is_harmless(above: tuple[ast.AST, ...]) -> bool:
    """Return whether the expression around a weight does not depend on its numbers."""
    match above[-1:]:
        case (ast.Attribute(attr=attribute),):
            return attribute in _HARMLESS
        case (ast.Call(func=ast.Name(id=("isinstance" | "hasattr"))),):
            return True
        case (ast.Compare(ops=[ast.Is() | ast.IsNot()]),):
            return True
        case (ast.Expr(),):
            return True
    return False


def chain(node: ast.AST) -> tuple[str, ...]:
    """Return the names of an expression such as `self.layers[0].mlp`, with a star for an index.

    Args:
        node: The expression.

    Returns:
        The names; empty if the expression is anything else.
    """
    names: list[str] = []
    current: Any = node
    while not isinstance(current, ast.Name):
        match current:
            case ast.Attribute(value=value, attr=name):
                names.append(name)
            case ast.Subscript(value=value):
                names.append("*")
            case _:
                return ()
        current = value
    return (current.id, *reversed(names))
