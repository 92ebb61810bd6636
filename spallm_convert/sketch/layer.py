"""The record of a linear layer to sketch: every name that it has, its shape and its weight."""

from __future__ import annotations

from dataclasses import dataclass

from spallm_formats import SketchedModule, StoredTensor


@dataclass(frozen=True)
class Layer:
    """Describe a linear layer to sketch; `Plan.layers` holds them.

    Attributes:
        name: Name of the module in the checkpoint, such as "layers.0.mlp.up_proj".
        path: Path of the module in the model, such as "model.layers.0.mlp.up_proj". Path and name
            differ if the checkpoint is of a base model without its head, for example.
        module: Shape, bits and groups.
        weight: The dense weight in the source, [out_features, in_features]. Only its header has
            been read.
    """

    name: str
    path: str
    module: SketchedModule
    weight: StoredTensor

    def inside(self, block: str) -> str | None:
        """Return the layer's path relative to a module's path, or None if it is not inside.

        Args:
            block: Path of the module in the model, such as "model.layers.0".
        """
        start = block + "."
        return self.path.removeprefix(start) if self.path.startswith(start) else None
