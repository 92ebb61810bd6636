"""Make the inputs of one forward pass of a tiny model."""

import inspect
from typing import Any

import torch

#: Ids at the end of the vocabulary of 64 stand for images and sounds, those at its start for
#: padding, beginning and end.
_FIRST, _LAST = 3, 57
_SAMPLES, _LENGTH = 2, 8


def tiny_inputs(name: str, model: Any) -> dict[str, torch.Tensor]:
    """Return the arguments of one forward pass, the same ones in every call.

    Args:
        name: A class of `ARCHITECTURES`.
        model: The model, dense or sketched.

    Returns:
        Tensors by the name of the argument: token ids, int64 [2, 8], for models that read text,
        also where they read images or sounds too. Otherwise pixels or sounds, float32.
    """
    generator = torch.Generator().manual_seed(0)
    taken = inspect.signature(model.forward).parameters
    given: dict[str, torch.Tensor] = {}
    if "input_ids" in taken:
        given["input_ids"] = _tokens(generator)
    if "decoder_input_ids" in taken:
        given["decoder_input_ids"] = _tokens(generator)
    for argument, shape in _SHAPES.get(name, {}).items():
        given[argument] = torch.randn(_SAMPLES, *shape, generator=generator)
    if not given:
        given["pixel_values"] = torch.randn(_SAMPLES, 3, 16, 16, generator=generator)
    return given | _further(name)


def _tokens(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(_FIRST, _LAST, (_SAMPLES, _LENGTH), generator=generator)


def _further(name: str) -> dict[str, torch.Tensor]:
    """Return arguments that are neither tokens nor random."""
    if name == "Siglip2Model":
        return {
            "pixel_attention_mask": torch.ones(_SAMPLES, 4, dtype=torch.int64),
            "spatial_shapes": torch.full((_SAMPLES, 2), 2),
        }
    if name == "ViTMAEModel":
        return {"noise": torch.arange(4.0).repeat(_SAMPLES, 1)}
    return {}


_IMAGE = {"pixel_values": (3, 16, 16)}
#: Shape of one sample of each float argument, by class; images alone are not listed.
_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "CLIPModel": _IMAGE,
    "AltCLIPModel": _IMAGE,
    "ChineseCLIPModel": _IMAGE,
    "SiglipModel": _IMAGE,
    "Siglip2Model": {"pixel_values": (4, 192)},
    "BlipForConditionalGeneration": _IMAGE,
    "Blip2ForConditionalGeneration": _IMAGE,
    "VideoMAEModel": {"pixel_values": (2, 3, 16, 16)},
    "WhisperForConditionalGeneration": {"input_features": (8, 16)},
    "Speech2TextForConditionalGeneration": {"input_features": (32, 8)},
    "MoonshineForConditionalGeneration": {"input_values": (2000,)},
    "Wav2Vec2Model": {"input_values": (400,)},
    "HubertModel": {"input_values": (400,)},
}
