"""Prove that a module computes the plain product with its weight, as `nn.Linear` does.

A class may store its weight transposed (`Conv1D` of GPT-2), write the product in another way
(`FalconLinear`), or compute something else (block-diagonal layers, routers). Names do not tell. So
the model's own code runs on a small copy of the module with random weights, and its outputs are
compared with the product.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .linear_weights import LinearWeight

#: Names under which modules keep the sizes of their weight.
_INPUTS, _OUTPUTS = ("in_features", "nx"), ("out_features", "nf")
_OTHERS = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)
#: Largest difference from the product, for values around 1 in a sum of at most 7.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1}


class Proofs:
    """Remember which kinds of modules compute a plain product: a model repeats a few kinds."""

    def __init__(self) -> None:
        self._known: dict[Any, bool | None] = {}

    def linear_weight(self, module: nn.Module) -> LinearWeight | None:
        """Describe the weight of a module that can be replaced by an `nn.Linear`.

        Args:
            module: The module. Its weight may be on the meta device.

        Returns:
            The record of its weight. None if its outputs are not the product of its inputs and its
            weight plus the bias, in the dtype of the inputs, or if it holds anything else.
        """
        if type(module) is nn.Linear:
            return LinearWeight(module.out_features, module.in_features)
        if not may_be_linear(module):
            return None
        kind = type(module), module.bias is not None, tuple(_settings(module))
        if kind not in self._known:
            self._known[kind] = _stored_transposed(module)
        transposed = self._known[kind]
        if transposed is None:
            return None
        weight: Tensor = module._parameters["weight"]  # type: ignore[assignment]  # not None
        rows, columns = weight.shape
        sizes = (columns, rows) if transposed else (rows, columns)
        return LinearWeight(*sizes, transposed=transposed)


def may_be_linear(module: nn.Module) -> bool:
    """Return whether a module holds a matrix `weight`, perhaps a `bias`, and nothing else.

    Args:
        module: The module. Its weight may be on the meta device.
    """
    own = module._parameters
    weight = own.get("weight")
    if weight is None or weight.dim() != 2 or not {"weight"} <= set(own) <= {"weight", "bias"}:
        return False
    if module._modules or module._buffers or module._forward_hooks or module._forward_pre_hooks:
        return False
    bias = getattr(module, "bias", None)
    has_bias = bias is None or (isinstance(bias, nn.Parameter) and bias.dim() == 1)
    return has_bias and hasattr(module, "bias") and "forward" not in vars(module)


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    """Return what the code of a module may depend on, apart from sizes."""
    return sorted(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and name not in {*_INPUTS, *_OUTPUTS}
    )


def _stored_transposed(module: nn.Module) -> bool | None:
    """Return whether the weight has a row per input; None if there is no plain product."""
    if isinstance(module, _OTHERS):
        return None
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        for transposed in (False, True):
            try:
                if all(_agrees(module, transposed, dtype) for dtype in _TOLERANCE):
                    return transposed
            except Exception:  # a model's code may raise anything for a size that does not fit
                continue
    return None


def _agrees(module: nn.Module, transposed: bool, dtype: torch.dtype) -> bool:
    """Return whether a small copy of a module computes the product, for several inputs."""
    weight = torch.randn(5, 7).to(dtype)
    matrix = weight.T if transposed else weight
    outputs, inputs = matrix.shape
    bias = None if module.bias is None else torch.randn(outputs).to(dtype)
    small = _small(module, weight, bias, inputs, outputs)
    for training in (False, True):
        small.training = training
        for shape in ((3, inputs), (2, 3, inputs)):
            x = torch.randn(shape).to(dtype)
            expected = nn.functional.linear(x, matrix, bias)
            found = small(x.clone())
            if not isinstance(found, Tensor) or found.dtype != dtype:
                return False
            if found.shape != expected.shape or (found - expected).abs().max() > _TOLERANCE[dtype]:
                return False
    return True


def _small(
    module: nn.Module, weight: Tensor, bias: Tensor | None, inputs: int, outputs: int
) -> nn.Module:
    """Return a copy of a module with another weight and bias; the module is not changed."""
    small = copy.copy(module)
    small.__dict__["_parameters"] = {
        "weight": nn.Parameter(weight),
        "bias": None if bias is None else nn.Parameter(bias),
    }
    for names, size in ((_INPUTS, inputs), (_OUTPUTS, outputs)):
        small.__dict__.update({name: size for name in names if name in vars(module)})
    return small
