"""The record of a linear layer to sketch: every name that it has, its shape and its weight."""

from __future__ import annotations

from dataclasses import dataclass

from spallm_formats import SketchedModule, StoredTensor


@dataclass(frozen=True)
class Layer:
    """A linear layer to sketch.

    Attributes:
        name: Name of the module in the checkpoint, such as "layers.0.mlp.up_proj".
        path: Path of the module in the model, such as "model.layers.0.mlp.up_proj". Path and name
            differ if the checkpoint is of a base model without its head, for example.
        module: Shape, bits and groups.
        weight: The dense weight in the source, [out_features, in_features].
    """

    name: str
    path: str
    module: SketchedModule
    weight: StoredTensor

    def inside(self, block: str) -> str | None:
        """Return the layer's name in the block at a path, None if the layer lies elsewhere."""
        start = block + "."
        return self.path.removeprefix(start) if self.path.startswith(start) else None
