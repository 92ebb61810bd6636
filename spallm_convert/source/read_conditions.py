"""Decide whether code behind a condition can run in a model with a certain config."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .source_reads import chain

_OPERATORS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_SIMPLE = (bool, int, float, str, type(None), torch.dtype)


class _UnknownError(Exception):
    """Raised for a value that depends on the inputs, or that is not looked at."""


def may_run(
    test: ast.expr, module: nn.Module, wanted: bool, *, training: bool | None = None
) -> bool:
    """Return whether a test in the code of a module may be true, or false.

    Only the settings of the module decide, such as `self.config.pretraining_tp`. A layer's weight
    counts as sketched: its dtype is uint8.

    Args:
        test: The test.
        module: The module that is `self` in it.
        wanted: Whether the code runs if the test is true, or if it is false.
        training: Mode of the module. None: either.

    Returns:
        False if the code never runs, True if it may run.
    """
    try:
        return bool(_value(test, module, training)) == wanted
    except _UnknownError:
        return True


def _value(node: ast.expr, module: nn.Module, training: bool | None) -> Any:
    """Return the value of an expression.

    Raises:
        _UnknownError: If it depends on more than the settings of the module.
    """
    match node:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, module, training)
        case ast.BoolOp(op=op, values=values):
            return _joined(values, module, training, stops=isinstance(op, ast.Or))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
            found = _value(left, module, training), _value(right, module, training)
            try:
                return _OPERATORS[type(op)](*found)
            except TypeError:
                raise _UnknownError from None
        case ast.Attribute():
            return _setting(chain(node), module, training)
    raise _UnknownError


def _joined(
    values: list[ast.expr], module: nn.Module, training: bool | None, *, stops: bool
) -> bool:
    """Return what `and` or `or` gives: one value that `stops` decides, whatever the others are."""
    unknown = False
    for value in values:
        try:
            if bool(_value(value, module, training)) == stops:
                return stops
        except _UnknownError:
            unknown = True
    if unknown:
        raise _UnknownError
    return not stops


def _setting(names: tuple[str, ...], module: nn.Module, training: bool | None) -> Any:
    """Return the value of `self.a.b` or of `torch.int8`, if it does not change while running."""
    if names == ("self", "training") and training is not None:
        return training
    if names[:1] == ("torch",) and len(names) == 2:
        value = getattr(torch, names[1], module)
    elif names[:1] == ("self",) and names[-2:] == ("weight", "dtype") and len(names) > 3:
        return torch.uint8
    elif names[:1] == ("self",) and "training" not in names and "*" not in names:
        value = module
        for name in names[1:]:
            try:
                value = getattr(value, name)
            except AttributeError:
                raise _UnknownError from None
    else:
        raise _UnknownError
    if not isinstance(value, _SIMPLE):
        raise _UnknownError
    return value
