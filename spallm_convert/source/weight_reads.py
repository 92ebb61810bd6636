"""Find the layers whose weight is read by other code than that of their own module.

Such code would find an index map in place of numbers. It is found in the source of the model's
classes, so code that runs only in training, with a cache, or with other kernels counts too. Code
behind a condition that the config makes false does not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from .read_conditions import may_run
from .source_reads import Read, reads_of


def read_weights(model: nn.Module, weights: Iterable[str]) -> dict[str, str]:
    """Find weights that the model's code reads outside of the module that they belong to.

    Args:
        model: The model, whose weights may be on the meta device.
        weights: Paths of the parameters to look for; each ends in ".weight".

    Returns:
        The function that reads it, such as "MambaMixer.forward", by path of the parameter.
    """
    owners = {weight.removesuffix(".weight") for weight in weights}
    above = {"", *(parent for owner in owners for parent in _parents(owner))}
    modules = {path: module for path, module in model.named_modules() if path in above}
    found: dict[str, str] = {}
    for path, module in modules.items():
        for read in reads_of(type(module)):
            if all(may_run(test, module, wanted) for test, wanted in read.conditions):
                for owner in _layers(read, path, module, owners):
                    found.setdefault(owner + ".weight", read.function)
    return found


def _parents(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _layers(read: Read, path: str, module: nn.Module, owners: set[str]) -> list[str]:
    """Return the layers whose weight an expression in the code of a module stands for."""
    inside = path + "." if path else ""
    if read.is_first_parameter:
        first = _first_parameter(module, read.names)
        owner = (inside + first).removesuffix(".weight")
        return [owner] if first and owner in owners else []
    names = r"\.".join(r"[^.]+" if name == "*" else re.escape(name) for name in read.names)
    # A variable that is not `self` may be any module below this one.
    between = "" if read.from_self else r"(.+\.)?"
    wanted = re.compile(re.escape(inside) + between + names)
    return [owner for owner in owners if wanted.fullmatch(owner)]


def _first_parameter(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Return the path of the first parameter below a submodule, relative to the module."""
    try:
        below = module.get_submodule(".".join(names))
    except AttributeError:
        return None
    first = next((name for name, _ in below.named_parameters()), None)
    return None if first is None else ".".join([*names, first])
