"""Find the parameters that hold the weights of experts, and prove how they are used.

A parameter counts if the model's own code multiplies inputs with it and does nothing else. This is
tried with stand-ins: the code runs for one token, and no weight is in memory.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spallm_convert.errors import one_line

from .expert_weights import ExpertWeights, call_with
from .linear_weights import LinearWeight

#: Names of classes that hold experts. Early versions of transformers 5 call some of them NaiveMoe.
_NAMES = re.compile("Experts|NaiveMoe")


def find_experts(model: nn.Module) -> tuple[dict[str, LinearWeight], dict[str, str]]:
    """Find the weights of experts in a model.

    Args:
        model: The model, whose weights may be on the meta device.

    Returns:
        The weights by path of the parameter, and for parameters of experts that cannot be sketched
        the reason, by path.
    """
    found: dict[str, LinearWeight] = {}
    unfit: dict[str, str] = {}
    known: dict[Any, dict[str, LinearWeight] | str] = {}
    for path, module in expert_modules(model):
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        key = (type(module), *sorted(shapes.items()))
        if key not in known:  # the same in every block
            known[key] = _probed(module)
        result = known[key]
        if isinstance(result, str):
            stacked = [name for name, shape in shapes.items() if len(shape) == 3]
            unfit |= {f"{path}.{name}": result for name in stacked}
        else:
            found |= {f"{path}.{name}": weight for name, weight in result.items()}
    return found, unfit


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model that hold the weights of several experts, with their paths.

    Args:
        model: The model.
    """
    inside = ""
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        if _NAMES.search(type(module).__name__) and _stacked(module):
            inside = path + "."
            yield path, module


def _stacked(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes (experts, rows, columns) of parameters that may hold experts' weights."""
    found = {}
    for name, parameter in module.named_parameters():
        owner = module.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.Linear | nn.Embedding):
            continue
        experts = getattr(module, "num_experts", None)
        if parameter.dim() == 3:
            found[name] = tuple(parameter.shape)
        elif parameter.dim() == 2 and experts and "." in name:  # DBRX: all rows below each other
            found[name] = (experts, parameter.shape[0] // experts, parameter.shape[1])
    return found


def _probed(module: nn.Module) -> dict[str, LinearWeight] | str:
    """Return the weights of a module of experts, or the reason why they cannot be sketched."""
    shapes = _stacked(module)
    sizes = dict.fromkeys(size for shape in shapes.values() for size in shape[:0:-1])
    reason = "the model's code does not multiply with it"
    for size in sizes:  # one of them is the size of the inputs
        used: dict[str, set[bool]] = {name: set() for name in shapes}
        try:
            _run(module, shapes, used, size)
        except ValueError:  # another size
            continue
        except Exception as error:  # a model's code may raise anything
            reason = f"the model's code does more than multiply with it ({one_line(error)})"
            continue
        if all(len(ways) == 1 for ways in used.values()):
            return {
                name: LinearWeight.of_experts(shape, transposed=used[name] == {False})
                for name, shape in shapes.items()
            }
    return reason


def _run(
    module: nn.Module, shapes: dict[str, tuple[int, ...]], used: dict[str, set[bool]], size: int
) -> None:
    """Run a module of experts for one token, and note how each weight is used."""

    def stand_in(name: str, shape: tuple[int, ...]) -> ExpertWeights:
        def product(expert: int, x: Tensor, transpose: bool) -> Tensor:
            used[name].add(transpose)
            return x.new_ones(x.shape[0], shape[1] if transpose else shape[2])

        return ExpertWeights(shape, token, product)

    with torch.device("cpu"), torch.no_grad():  # not on the device of `torch.device` around
        token = torch.ones(1, size)
        weights: dict[str, Any] = {name: stand_in(name, shape) for name, shape in shapes.items()}
        rest = [*module.named_parameters(), *module.named_buffers()]
        weights |= {name: torch.zeros(v.shape) for name, v in rest if name not in shapes}
        experts = next(iter(shapes.values()))[0]
        own = getattr(type(module).forward, "__wrapped__", type(module).forward)
        match list(inspect.signature(own).parameters)[1:]:
            case [_]:  # Llama 4: all tokens for every expert
                call_with(module, weights, torch.ones(experts, size))
            case [_, "expert_size"]:
                call_with(module, weights, token, [1] + [0] * (experts - 1))
            case _:  # the token chooses two experts: LongCat's code fails for one
                first = torch.zeros(1, 2, dtype=torch.long)
                call_with(module, weights, token, first, torch.ones(1, 2))
