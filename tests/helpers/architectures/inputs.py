"""Make the inputs of one forward pass of a tiny model."""

import inspect
from typing import Any

import torch

from .media import MEDIA

#: Ids at the end of the vocabulary of 64 stand for images and sounds, those at its start for
#: padding, beginning and end.
_FIRST, _LAST, _MEDIUM = 3, 57, 63
_SAMPLES, _LENGTH = 2, 12


def tiny_inputs(name: str, model: Any) -> dict[str, torch.Tensor]:
    """Return the arguments of one forward pass, the same ones in every call.

    Args:
        name: A class of `ARCHITECTURES`.
        model: The model, dense or sketched.

    Returns:
        Tensors by the name of the argument: token ids, int64 [2, 12], for models that read text,
        and images or sounds, float32, for models that take them.
    """
    generator = torch.Generator().manual_seed(0)
    taken = inspect.signature(model.forward).parameters
    medium = MEDIA.get(name)
    given: dict[str, torch.Tensor] = {}
    if "input_ids" in taken:
        given["input_ids"] = _tokens(generator)
        if medium is not None:
            given["input_ids"][:, 1 : 1 + medium.tokens] = _MEDIUM
    if "decoder_input_ids" in taken:
        given["decoder_input_ids"] = _tokens(generator)
    if medium is not None:
        for argument, shape in medium.random.items():
            given[argument] = torch.randn(*shape, generator=generator)
        given |= {argument: torch.tensor(value) for argument, value in medium.fixed.items()}
    if not given:
        given["pixel_values"] = torch.randn(_SAMPLES, 3, 16, 16, generator=generator)
    if medium is not None and medium.types in taken:
        given[medium.types] = (given["input_ids"] == _MEDIUM).long()
    return given


def _tokens(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(_FIRST, _LAST, (_SAMPLES, _LENGTH), generator=generator)
