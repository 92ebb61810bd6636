"""Stand-ins for the weights of experts, with which the model's own code computes.

A model multiplies with `self.gate_up_proj[expert]` or with the whole parameter. In place of the
parameter, `ExpertWeights` gives the product to a function, which may look a sketch up, record the
inputs, or only note that there was a product. So the activation, the biases, and the order of
experts stay those of the model's own code. Anything else than a product raises TypeError.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Takes the number of an expert, inputs [tokens, in_features], and whether the product is with the
#: transpose of the parameter, as in `nn.functional.linear`. Returns outputs [tokens, out_features].
Product = Callable[[int, Tensor, bool], Tensor]


class ExpertWeights:
    """Stand for a parameter that holds the weights of all experts.

    Args:
        shape: Shape of the parameter, (experts, rows, columns).
        like: A tensor with the dtype and the device that the model's code sees.
        product: Computes a product with the weight of one expert.
    """

    ndim = 3

    def __init__(self, shape: tuple[int, ...], like: Tensor, product: Product) -> None:
        self.shape = torch.Size(shape)
        self.dtype, self.device = like.dtype, like.device
        self._product = product

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or the size of one dimension."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Return the number of dimensions, 3."""
        return self.ndim

    def view(self, *shape: Any) -> ExpertWeights:
        """Return this object if the shape is its own; DBRX views its parameters in three."""
        wanted = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if tuple(wanted[1:]) != tuple(self.shape[1:]) or wanted[0] not in (-1, self.shape[0]):
            raise TypeError(f"weights of experts {list(self.shape)} are viewed as {list(wanted)}")
        return self

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: Any) -> ExpertWeight:
        if isinstance(expert, tuple | slice) or getattr(expert, "numel", lambda: 1)() != 1:
            raise TypeError("weights of several experts are taken at once")
        return ExpertWeight(self, int(expert), is_transpose=False)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Tensor:
        name = getattr(func, "__name__", str(func))
        if name not in ("bmm", "matmul", "__matmul__") or len(args) != 2 or kwargs:
            raise TypeError(f"the weights of experts are used in {name}")
        x, weights = args
        if not isinstance(weights, ExpertWeights) or x.dim() != 3:
            raise TypeError(f"the weights of experts are used in {name}")
        # Llama 4 gives every expert all tokens and zeros those of others: zero times a weight is
        # zero, so these products are not computed.
        parts = [
            weights._product(expert, tokens, False)
            if not tokens.numel() or bool(tokens.any())
            else tokens.new_zeros(tokens.shape[0], weights.shape[-1])
            for expert, tokens in enumerate(x)
        ]
        return torch.stack(parts)


class ExpertWeight:
    """Stand for the weight of one expert.

    Args:
        weights: The weights of all experts.
        expert: Number of the expert.
        is_transpose: Whether this is the transpose of the expert's part of the parameter.
    """

    ndim = 2

    def __init__(self, weights: ExpertWeights, expert: int, *, is_transpose: bool) -> None:
        self._weights, self._expert, self._is_transpose = weights, expert, is_transpose
        rows, columns = weights.shape[-2:]
        self.shape = torch.Size((columns, rows) if is_transpose else (rows, columns))
        self.dtype, self.device = weights.dtype, weights.device

    @property
    def T(self) -> ExpertWeight:  # noqa: N802  the name in torch
        """Return the transpose."""
        return ExpertWeight(self._weights, self._expert, is_transpose=not self._is_transpose)

    def t(self) -> ExpertWeight:
        """Return the transpose."""
        return self.T

    def to(self, *args: Any, **kwargs: Any) -> ExpertWeight:
        """Return this object: the product has the dtype and the device of its input."""
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Tensor:
        name = getattr(func, "__name__", str(func))
        kwargs = dict(kwargs or {})
        if name == "linear" and len(args) in (2, 3) and isinstance(args[1], ExpertWeight):
            bias = args[2] if len(args) == 3 else kwargs.pop("bias", None)
            y = args[1]._multiplied(args[0], transpose=True)
            if not kwargs:
                return y if bias is None else y + bias
        if name in ("matmul", "__matmul__", "mm") and len(args) == 2 and not kwargs:
            x, weight = args
            if isinstance(weight, ExpertWeight):
                return weight._multiplied(x, transpose=False)
        raise TypeError(f"the weight of an expert is used in {name}")

    def _multiplied(self, x: Tensor, *, transpose: bool) -> Tensor:
        """Return x times this matrix, or times its transpose."""
        columns = self.shape[1] if transpose else self.shape[0]
        if x.shape[-1] != columns:
            raise ValueError(f"inputs {list(x.shape)} do not fit an expert {list(self.shape)}")
        rows = x.reshape(-1, columns)
        y = self._weights._product(self._expert, rows, transpose != self._is_transpose)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def call_with(module: nn.Module, weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Call a module of experts with other weights, in its own code.

    transformers chooses between several implementations of experts. The plain one, which a model
    defines, is called.

    Args:
        module: The module of experts.
        weights: What its code finds in place of parameters and buffers, by path in the module.
        args: Arguments of the call.
        kwargs: Keyword arguments of the call.
    """
    forward = type(module).forward
    own = getattr(forward, "__wrapped__", forward)
    return own(_face(module, weights), *args, **kwargs)


def _face(module: nn.Module, weights: Mapping[str, Any]) -> nn.Module:
    """Return a shallow copy of a module that has other weights; the module is not changed."""
    face = copy.copy(module)
    below: dict[str, dict[str, Any]] = {}
    face.__dict__["_parameters"] = dict(module._parameters)
    face.__dict__["_buffers"] = dict(module._buffers)
    for path, weight in weights.items():
        name, _, rest = path.partition(".")
        if rest:
            below.setdefault(name, {})[rest] = weight
        else:
            face._parameters.pop(name, None)
            face._buffers.pop(name, None)
            face.__dict__[name] = weight
    if below:
        inner = {name: _face(module.get_submodule(name), part) for name, part in below.items()}
        face.__dict__["_modules"] = dict(module._modules) | inner
    return face
