"""The record of a weight to sketch: its names, its shape, and where the model has its rows."""

from __future__ import annotations

from dataclasses import dataclass

from spallm_formats import INDEX_MAP_SUFFIX, SketchedModule, StoredTensor


@dataclass(frozen=True)
class Part:
    """Describe rows of a stored weight that lie together in a parameter of the model.

    Rows are those of the sketch: one for each output, and those of all experts below each other.

    Attributes:
        parameter: Path of the parameter, such as "model.layers.0.mlp.up_proj.weight".
        first: Number of the first of these rows in the parameter.
        stored_first: Number of the first of these rows in the stored weight.
        rows: Number of rows.
    """

    parameter: str
    first: int
    stored_first: int
    rows: int


@dataclass(frozen=True)
class Layer:
    """Describe a stored weight to sketch; `Plan.layers` holds them.

    It is the weight of a linear layer, or of one expert, or of all experts of a block.

    Attributes:
        name: Name of the module in the checkpoint, such as "layers.0.mlp.up_proj". For the fused
            weights of experts, the name of the tensor.
        module: Shape, bits and groups.
        weight: The dense weight in the source. Only its header has been read.
        parts: Where the model has the rows of the weight. Nearly always this is one parameter.
    """

    name: str
    module: SketchedModule
    weight: StoredTensor
    parts: tuple[Part, ...]

    @property
    def path(self) -> str:
        """Return the path of the layer in the model, or of the experts' parameter.

        An example is "model.layers.0.mlp.up_proj". Path and name differ if the checkpoint is of a
        base model without its head, for example, and if transformers renames the weight.
        """
        return self.parts[0].parameter.removesuffix(INDEX_MAP_SUFFIX)

    @property
    def is_whole(self) -> bool:
        """Return whether the weight is the whole weight of one linear layer of the model."""
        part = self.parts[0]
        return (
            len(self.parts) == 1
            and self.module.experts is None
            and part.first == 0
            and part.parameter.endswith(INDEX_MAP_SUFFIX)
        )

    def inside(self, block: str) -> str | None:
        """Return the layer's path relative to a module's path, or None if it is not inside.

        Args:
            block: Path of the module in the model, such as "model.layers.0".
        """
        start = block + "."
        return self.path.removeprefix(start) if self.path.startswith(start) else None
