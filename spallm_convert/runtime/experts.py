"""Run the experts of a block with sketched weights, in the model's own code.

Each class of experts gets a subclass, in which an index map and tables stand in place of a weight.
When it is called, the model's code finds stand-ins that look products up. So routing, activations,
and biases are the model's own, and only the weights of experts that have tokens are looked up.

The code of most classes is a loop that is known. It is replaced by calls for all experts at once
(see `grouped_experts.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spallm_convert.source.expert_weights import ExpertWeights, call_with
from spallm_formats import row_bytes

from .grouped_experts import can_group, run_grouped
from .sketch import Sketch, Sketched, affine_paths, table_path, tables_in_use


class SketchedExperts(Sketched, nn.Module):
    """Compute with sketched weights in the code of another class of experts, its dense class.

    In place of a weight, the module has two parameters: the index map under the name of the weight,
    uint8 [experts, out_features, row_bytes], frozen, and the tables, which have "_table" at the end
    of their name, float [experts, out_features, groups_per_row, 2^bits]. Both have a row per
    output, even if the dense weight has a row per input.

    Use `sketch_experts` to make one, and `sketched_class` for the classes.

    Attributes:
        dense_class: The class whose code is run.
        dense_shapes: Shapes of the dense weights, by path of the parameter in the module.
    """

    dense_class: Any
    dense_shapes: dict[str, tuple[int, ...]]

    def dense_weight(self, path: str) -> Tensor:
        """Return the dense weight of all experts, as the dense class holds it.

        Args:
            path: Path of the parameter in the module.
        """
        sketch = self.sketches[path]
        owner, name = _owner(self, path)
        index_map, table = owner.get_parameter(name), tables_in_use(owner, name)
        parts = [
            sketch.dense_weight(codes, values, expert=expert)
            for expert, (codes, values) in enumerate(zip(index_map, table, strict=True))
        ]
        stacked = torch.stack([part.T if sketch.shape.transposed else part for part in parts])
        return stacked.reshape(self.dense_shapes[path])

    def extra_repr(self) -> str:
        lines = [
            f"{path}: experts={s.shape.experts}, in_features={s.shape.in_features}, "
            f"out_features={s.shape.out_features}, bits={s.shape.bits}, "
            f"groups_per_row={s.shape.groups_per_row}"
            for path, s in self.sketches.items()
        ]
        return "\n".join(lines)

    def __copy__(self) -> SketchedExperts:
        # FSDP2 makes subclasses whose instances cannot be made in the usual way.
        made: SketchedExperts = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not sketched_class(self.dense_class):  # FSDP2's class
            return super().__reduce_ex__(protocol)
        return _blank, (self.dense_class,), self.__dict__


@functools.cache
def sketched_class(dense_class: Any) -> type[SketchedExperts]:
    """Return the subclass of a class of experts that computes with sketched weights."""
    dense_forward = dense_class.forward
    # transformers wraps the code of a model to choose other implementations, which need weights.
    plain = getattr(dense_forward, "__wrapped__", dense_forward)

    @functools.wraps(plain)
    def forward(self: SketchedExperts, *args: Any, **kwargs: Any) -> Any:
        if can_group(self):
            return run_grouped(self, *args, **kwargs)
        return _run(self, *args, **kwargs)

    return type(
        f"Sketched{dense_class.__name__}",
        (SketchedExperts, dense_class),
        {"__module__": __name__, "dense_class": dense_class, "forward": forward},
    )


def sketch_experts(
    module: nn.Module, sketches: Mapping[str, Sketch], table_dtype: torch.dtype | None
) -> None:
    """Turn a module of experts into a sketched one. Loading a checkpoint fills its parameters.

    Args:
        module: The module, which is changed.
        sketches: What to put in place of its weights, by path of the parameter in the module.
        table_dtype: Dtype of the tables. None: the dtype of the weight.
    """
    dense_class: Any = type(module)
    shapes = {path: tuple(module.get_parameter(path).shape) for path in sketches}
    for path, sketch in sketches.items():
        owner, name = _owner(module, path)
        dense, shape = owner.get_parameter(name), sketch.shape
        packed = 0 if sketch.hash_seed is not None else row_bytes(shape.in_features, shape.bits)
        size = (*shape.table_shape[:2], packed)
        index_map = torch.empty(size, dtype=torch.uint8, device=dense.device)
        table = torch.empty(
            shape.table_shape, dtype=table_dtype or dense.dtype, device=dense.device
        )
        owner.register_parameter(name, nn.Parameter(index_map, requires_grad=False))
        owner.register_parameter(table_path(name), nn.Parameter(table))
        owner._is_hf_initialized = True  # type: ignore[assignment]  # as in SketchedLinear
    module.__class__ = sketched_class(dense_class)
    module.sketches = dict(sketches)  # type: ignore[assignment]
    module.dense_shapes = shapes  # type: ignore[assignment]
    module._is_hf_initialized = True  # type: ignore[assignment]


def dense_experts(module: SketchedExperts, dtype: torch.dtype | None) -> None:
    """Turn a sketched module of experts back into one with dense weights.

    Args:
        module: The module, which is changed.
        dtype: Dtype of the weights. None: the dtype of the tables.
    """
    for path in module.sketches:
        weight = module.dense_weight(path).to(dtype)
        owner, name = _owner(module, path)
        delattr(owner, table_path(name))
        for affine in affine_paths(name):
            owner._parameters.pop(affine, None)
        owner.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    del module.sketches, module.dense_shapes
    module.__class__ = module.dense_class


class _Lookup:
    """Compute products with the weights of single experts."""

    def __init__(self, sketch: Sketch, index_map: Tensor, table: Tensor) -> None:
        self._sketch, self._index_map = sketch, index_map
        # `table[expert]` would make a gradient of the size of all tables for each expert.
        self._tables = table.unbind(0)

    def __call__(self, expert: int, x: Tensor, transpose: bool) -> Tensor:
        if transpose == self._sketch.shape.transposed:
            raise TypeError("the weights of experts are used in another direction than expected")
        if not len(x):
            return x.new_zeros(0, self._sketch.shape.out_features)
        return self._sketch.product(x, self._index_map[expert], self._tables[expert], expert=expert)


# The model's code handles a number of tokens per expert that depends on the data.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _run(module: SketchedExperts, *args: Any, **kwargs: Any) -> Any:
    given = (*args, *kwargs.values())
    like = next(v for v in given if isinstance(v, Tensor) and v.is_floating_point())
    weights = {}
    for path, sketch in module.sketches.items():
        shape, stacked = sketch.shape, (sketch.shape.out_features, sketch.shape.in_features)
        owner, name = _owner(module, path)
        lookup = _Lookup(sketch, getattr(owner, name), tables_in_use(owner, name))
        seen = stacked[::-1] if shape.transposed else stacked
        weights[path] = ExpertWeights((shape.experts or 1, *seen), like, lookup)
    return call_with(module, weights, *args, **kwargs)


def _blank(dense_class: Any) -> SketchedExperts:
    """Return a sketched module without any attributes, for copies and pickles to fill."""
    made: SketchedExperts = object.__new__(sketched_class(dense_class))
    return made


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module that has a parameter of its own, and the name that it has there."""
    where, _, name = path.rpartition(".")
    return module.get_submodule(where), name
