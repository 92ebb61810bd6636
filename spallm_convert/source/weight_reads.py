"""Find the layers whose weight is read by other code than that of their own module.

Such code would find an index map in place of numbers. It is found in the source of the model's
classes, so code that runs with a cache or with other kernels counts too. Code behind a condition
that the config makes false does not count. `weight_watch` runs the code of other classes than those
of transformers too.

Mixers of state-space models read weights only in training, to pass them to one fused kernel; in
evaluation mode they multiply step by step. Such a weight may be sketched if the module stays in
evaluation mode, which is safe where the module does nothing else with its mode.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from .read_conditions import may_run
from .source_reads import Read, mode_tests, reads_of


def read_weights(model: nn.Module, weights: Iterable[str]) -> dict[str, str]:
    """Find weights that the model's code reads outside of the module that they belong to.

    Args:
        model: The model, whose weights may be on the meta device.
        weights: Paths of the parameters to look for; each ends in ".weight".

    Returns:
        The function that reads it, such as "MambaMixer.forward", by path of the parameter. Weights
        that are read only in training, by a module of `read_in_training`, are not among them.
    """
    found: dict[str, str] = {}
    for path, module, read, layers in _reads(model, weights):
        if _needs_numbers(read, module, path):
            found |= {f"{layer}.weight": read.function for layer in layers} | found
    return found


def known_reads(model: nn.Module, weights: Iterable[str]) -> set[tuple[str, str]]:
    """Return the weights in the source of the model's classes with the functions that read them.

    Args:
        model: The model, whose weights may be on the meta device.
        weights: Paths of the parameters to look for; each ends in ".weight".

    Returns:
        Pairs of a path and a function, also of those that never run.
    """
    reads = _reads(model, weights, running=False)
    return {(f"{layer}.weight", read.function) for _, _, read, layers in reads for layer in layers}


def read_in_training(model: nn.Module, weights: Iterable[str]) -> list[str]:
    """Find modules that have to stay in evaluation mode if certain weights are sketched.

    Args:
        model: The model, whose weights may be on the meta device, or whose layers are sketched.
        weights: Paths of the parameters that are sketched; each ends in ".weight".

    Returns:
        The paths of the modules, such as "backbone.layers.0.mixer".
    """
    found = {
        path: None
        for path, module, read, _ in _reads(model, weights)
        if not _needs_numbers(read, module, path)
    }
    return list(found)


def _needs_numbers(read: Read, module: nn.Module, path: str) -> bool:
    """Return whether a read happens although the module is in evaluation mode."""
    if all(may_run(test, module, wanted, training=False) for test, wanted in read.conditions):
        return True
    elsewhere = mode_tests(type(module))
    if any(test is None or may_run(test, module, True) for test in elsewhere):
        return True
    return path == "" or not read.from_self


def _reads(
    model: nn.Module, weights: Iterable[str], *, running: bool = True
) -> Iterator[tuple[str, nn.Module, Read, list[str]]]:
    """Yield the path and the module of each read that may happen, and the layers that it reads."""
    owners = {weight.removesuffix(".weight") for weight in weights}
    above = {"", *(parent for owner in owners for parent in _parents(owner))}
    for path, module in model.named_modules():
        if path not in above:
            continue
        for read in reads_of(type(module)):
            conditions = read.conditions if running else ()
            if all(may_run(test, module, wanted) for test, wanted in conditions):
                layers = _layers(read, path, module, owners)
                if layers:
                    yield path, module, read, layers


def _parents(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _layers(read: Read, path: str, module: nn.Module, owners: set[str]) -> list[str]:
    """Return the layers whose weight an expression in the code of a module stands for."""
    inside = path + "." if path else ""
    if read.is_first_parameter:
        first = _first_parameter(module, read.names)
        owner = "" if first is None else (inside + first).removesuffix(".weight")
        return [owner] if owner in owners else []
    if read.from_self and "*" not in read.names:
        owner = inside + ".".join(read.names)
        return [owner] if owner in owners else []
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
