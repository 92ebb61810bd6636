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


@lru_cache(maxsize=1024)
def reads_of(module_class: type[nn.Module]) -> tuple[Read, ...]:
    """List the expressions in a class and its parents that use the weight of a submodule.

    Functions that prepare weights, and those that no code in the same file calls, are left out. The
    functions of the file that belong to no class are read with each class.

    Args:
        module_class: The class of a module.

    Returns:
        The expressions. None are found in classes without a source file.
    """
    found: list[Read] = []
    for parent in module_class.__mro__:
        if parent is object or parent.__module__.startswith(_LIBRARY):
            continue
        tree = _parsed(parent.__module__)
        if tree is not None:
            called = _names(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef) and node.name == parent.__name__:
                    found += _reads_in(node.body, parent.__name__ + ".", called)
            found += _reads_in(tree.body, "", called)
    return tuple(found)


@lru_cache(maxsize=256)
def _parsed(module_name: str) -> ast.Module | None:
    """Return the syntax tree of a Python module, if its source may read weights."""
    try:
        file = inspect.getsourcefile(sys.modules[module_name])
        source = Path(file or "").read_text(encoding="utf-8")
    except (KeyError, TypeError, OSError, UnicodeDecodeError):  # built in, or typed in
        return None
    if ".weight" not in source and ".parameters()" not in source:
        return None
    return ast.parse(source)


def _names(tree: ast.Module) -> set[str]:
    """Return every name that the code of a file uses."""
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
    names = _names_of_weight(node)
    if names and not _is_harmless(above):
        yield Read(names[1:], names[0] == "self", function, conditions)
    names = _names_of_parameters(node)
    if names and not _is_harmless(above[:-1]):
        yield Read(names[1:], True, function, conditions, is_first_parameter=True)
    inside = (*above, node)
    if isinstance(node, ast.If | ast.IfExp):
        # If the test is false, nothing that it compares has an effect.
        met, unmet = (*conditions, (node.test, True)), (*conditions, (node.test, False))
        yield from _walk(node.test, inside, function, met)
        for branch, holds in ((node.body, met), (node.orelse, unmet)):
            for child in branch if isinstance(branch, list) else [branch]:
                yield from _walk(child, inside, function, holds)
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, inside, function, conditions)


def _names_of_weight(node: ast.AST) -> tuple[str, ...]:
    """Return ("self", "a", "b") for self.a.b.weight; empty for all else, also for self.weight."""
    if isinstance(node, ast.Attribute) and node.attr == "weight":
        names = chain(node.value)
        return names if len(names) > 1 else ()
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
