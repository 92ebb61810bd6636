"""Stack experts in the way of transformers, and take them apart without losing dimensions.

Only models that are loaded need this module. The loading code of transformers may be half imported
when the quantizer is imported.
"""

from __future__ import annotations

from typing import Any

from transformers.core_model_loading import MergeModulelist, SplitModulelist


class Stack(MergeModulelist):
    """Stack the weights of experts. When a model is saved, they get their former shapes again."""

    @property
    def reverse_op(self) -> TakeApart:
        return TakeApart(self.dim)


class TakeApart(SplitModulelist):
    """Take stacked weights of experts apart, and keep dimensions of size 1."""

    def convert(  # type: ignore[override]  # without types in transformers
        self, input_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the weights of single experts by name."""
        parts = [v[0] if isinstance(v, list) else v for v in input_dict.values()]
        # If there are several, they are equal parts of one weight. So all experts have one shape.
        shape = parts[0].select(self.dim, 0).shape
        usual: Any = super()
        found = usual.convert(input_dict, *args, **kwargs)
        return {name: tensor.reshape(shape) for name, tensor in found.items()}
