"""Run a model without its weights, and notice code that reads the weight of a linear layer.

The source of a class does not show everything: a function may get a layer as an argument, or take
the first parameter of a module. So the model's code runs for a few tokens on the meta device, on a
copy whose weights report what is done with them. Numbers that the code asks for are made up. An
error ends the run; what was noticed until then counts.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .experts import expert_modules

_TOKENS = 4
_SHAPES = {"pixel_values": (3, 224, 224), "input_values": (4000,), "input_features": (80, 3000)}
#: What code may ask of a weight without reading its numbers or their dtype.
_HARMLESS = {
    "device",
    "requires_grad",
    "is_meta",
    "is_cuda",
    "grad",
    "__hash__",
    "numel",
    "is_leaf",
}


#: Most numbers that are made up in a run; more are asked for by a loop that has no other end.
_MOST_GUESSES = 10_000


class _Guesses(TorchDispatchMode):  # type: ignore[no-untyped-call]  # in torch
    """Answer questions about numbers that are not there, such as whether a mask is all ones."""

    def __init__(self, answer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # in torch
        self._answer, self._left = answer, _MOST_GUESSES

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and self._left:
            self._left -= 1
            return bool(self._answer) if args[0].dtype == torch.bool else self._answer
        return func(*args, **(kwargs or {}))


class _Watched(Tensor):
    """A weight on the meta device that reports its use. It passes for integers, as a sketch is."""

    path: str
    notice: Callable[[str], None]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        asked = getattr(getattr(func, "__self__", None), "__name__", name)  # of a property's getter
        watched = [value for value in _flat([args, kwargs or {}]) if isinstance(value, _Watched)]
        if asked == "is_floating_point":
            return False
        if asked not in _HARMLESS:
            for weight in watched:
                weight.notice(weight.path)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def watch_weights(model: nn.Module, weights: Iterable[str]) -> dict[str, str]:
    """Run a model's code on the meta device, and find weights that it reads.

    Args:
        model: The model. It is not changed, and its weights are not copied.
        weights: Paths of the parameters to watch; each ends in ".weight".

    Returns:
        The function that reads it, such as "MambaMixer.forward", by path of the parameter.
    """
    found: dict[str, str] = {}
    reached: set[str] = set()

    def notice(path: str) -> None:
        found.setdefault(path, _function_outside())

    with suppress(Exception), torch.random.fork_rng(devices=[]), torch.no_grad():
        watched = [weight.removesuffix(".weight") for weight in weights]
        with torch.device("meta"):
            copied = _without_weights(model)
            for path in watched:
                _watch(copied.get_submodule(path), path, notice, reached)
            for part, inside in _models(copied):
                below = {path for path in watched if path.startswith(inside)}
                if below and not below & reached:
                    _run(part)
    return found


def _without_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device, with stubs in place of modules of experts."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.to("meta"), requires_grad=False)
        if isinstance(tensor, nn.Parameter)
        else tensor.to("meta")
        for tensor in tensors
    }
    memo |= {id(module): _Zeros() for _, module in expert_modules(model)}
    return copy.deepcopy(model, memo).eval()


class _Zeros(nn.Module):
    """Stand for a module of experts, whose loops depend on the router."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(hidden)


def _watch(module: nn.Module, path: str, notice: Callable[[str], None], reached: set[str]) -> None:
    """Replace a module's weight by one that reports its use, except in the module's own code."""
    plain, own = module._parameters["weight"], module.forward
    if plain is None:
        return
    watched = plain.detach().as_subclass(_Watched)
    watched.path, watched.notice = f"{path}.weight", notice

    def forward(*args: Any, **kwargs: Any) -> Any:
        reached.add(path)
        module._parameters["weight"] = plain
        try:
            return own(*args, **kwargs)
        finally:
            vars(module)["_parameters"]["weight"] = watched

    vars(module)["forward"] = forward
    vars(module)["_parameters"]["weight"] = watched


def _models(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the model and the models inside it, such as the towers, each with its prefix."""
    from transformers import PreTrainedModel

    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            yield module, path + "." if path else ""


def _run(model: Any) -> None:
    """Run a model for a few tokens, or for one image or sound, as far as it goes."""
    name = model.main_input_name
    config = getattr(model.config, "vision_config", model.config)
    if name in _SHAPES:
        shape = _SHAPES[name]
        size = getattr(config, "image_size", None)
        if name == "pixel_values" and isinstance(size, int):
            shape = (getattr(config, "num_channels", 3), size, size)
        inputs = {name: torch.zeros(1, *shape)}
    else:
        inputs = {name: torch.zeros(1, _TOKENS, dtype=torch.long)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.zeros(1, _TOKENS, dtype=torch.long)
    for answer, option in ((1, {}), (1, {"use_cache": False}), (0, {})):
        with suppress(Exception), warnings.catch_warnings():  # a model's code may raise anything
            warnings.simplefilter("ignore")
            with _Guesses(answer), _no_autocast():
                model(**inputs, **option)
            return


@contextmanager
def _no_autocast() -> Iterator[None]:
    """Let code ask for autocast, which torch does not know on the meta device."""
    asked, entered = torch.is_autocast_enabled, torch.autocast

    def is_off(*_: Any) -> bool:
        return False

    def nothing(*_: Any, **__: Any) -> Any:
        return nullcontext()

    try:
        torch.is_autocast_enabled = is_off  # type: ignore[assignment]
        torch.autocast = nothing  # type: ignore[assignment,misc]
        yield
    finally:
        torch.is_autocast_enabled, torch.autocast = asked, entered  # type: ignore[misc]


def _function_outside() -> str:
    """Return the class and the function that asked for a weight."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and not module.startswith("torch."):
            break
    return frame.f_code.co_qualname


def _flat(values: Any) -> Iterator[Any]:
    """Yield the values inside nested containers."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list | tuple):
        for value in values:
            yield from _flat(value)
    else:
        yield values
