"""Find the layers of a model in vLLM that take tables by request, and give them slots for sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from .embedding import SketchedEmbeddingMethod
from .experts import SketchedExpertsMethod
from .linear import SketchedLinearMethod
from .sets import ServedLayer


def find_layers(model: nn.Module) -> list[tuple[str, ServedLayer]]:
    """Return the sketched layers of a model, with their names. A tied head is its embedding.

    Args:
        model: The loaded model.
    """
    found = []
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, SketchedExpertsMethod):
            for part, product in method.products.items():
                columns = method.columns[part]
                found.append((name, ServedLayer(getattr(module, part), [product], columns, True)))
        elif isinstance(method, SketchedLinearMethod) or (
            isinstance(method, SketchedEmbeddingMethod) and method.owner is module
        ):
            sketch = method.sketch
            found.append((name, ServedLayer(module, sketch.products, sketch.columns, True)))
    return found


def served_layers(
    model: nn.Module, wrapper_of: Callable[[str], Any], slots: int
) -> list[ServedLayer]:
    """Give the sketched layers of a model slots, and tell them where the sets of tokens are.

    Args:
        model: The loaded model.
        wrapper_of: Returns what vLLM knows of the tokens of a layer, by its name. None: requests
            have no adapters there, as in a vision tower.
        slots: Number of slots.
    """
    layers = []
    for name, layer in find_layers(model):
        wrapper = wrapper_of(name)
        if wrapper is not None:
            _add_slots(layer, slots)
            owner = model.get_submodule(name)
            # Before the first step, vLLM has filled in nothing.
            for buffer, sets in (
                ("sets_of_tokens", wrapper._token_lora_indices),
                ("sets_of_samples", wrapper._sampler_indices),  # a head gets sampled tokens only
            ):
                owner.register_buffer(buffer, sets.fill_(-1), persistent=False)
        layers.append(dataclasses.replace(layer, takes_sets=wrapper is not None))
    return layers


def _add_slots(layer: ServedLayer, slots: int) -> None:
    for number, product in enumerate(layer.products):
        if product.table is not None:
            table = getattr(layer.module, product.table)
            product.slots = f"table_slots_{number}" if number else "table_slots"
            layer.module.register_buffer(
                product.slots, table.new_zeros(slots, *table.shape), persistent=False
            )
