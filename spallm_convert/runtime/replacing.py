"""Put sketched layers in place of the dense layers of a model, and the other way round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from spallm_convert.source.experts import expert_modules

from .embedding import SketchedEmbedding
from .experts import SketchedExperts, dense_experts, sketch_experts
from .linear import SketchedLinear
from .sketch import Sketch
from .tying import tie_sketches, unfit_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def replace_weights(
    model: PreTrainedModel, sketches: Mapping[str, Sketch], table_dtype: torch.dtype | None
) -> None:
    """Replace the layers and the experts whose weights are sketched.

    Args:
        model: The dense model, which is changed.
        sketches: The sketches by path of the weight, from `resolve`.
        table_dtype: Dtype of the tables. None: the dtype of each weight.
    """
    remaining = dict(sketches)
    for path, module in list(expert_modules(model)):
        inside = {
            name: remaining.pop(f"{path}.{name}")
            for name, _ in module.named_parameters()
            if f"{path}.{name}" in remaining
        }
        if inside:
            sketch_experts(module, inside, table_dtype)
    made: dict[str, nn.Module] = {}
    for weight, sketch in remaining.items():
        path = weight.removesuffix(".weight")
        made[path] = _replaced(model, path, sketch, table_dtype)
    tie_sketches(
        model,
        made,
        lambda path, owner: _replaced(model, path, remaining[f"{owner}.weight"], table_dtype),
    )


def _replaced(
    model: PreTrainedModel, path: str, sketch: Sketch, table_dtype: torch.dtype | None
) -> nn.Module:
    """Put a sketched layer or embedding in place of the dense one, and return it."""
    dense = model.get_submodule(path)
    weight = dense.get_parameter("weight")
    made: nn.Module
    if isinstance(dense, nn.Embedding):
        made = SketchedEmbedding(sketch, dense, table_dtype or weight.dtype)
    else:
        made = SketchedLinear(
            sketch.shape,
            bias=dense.get_parameter("bias") if dense.bias is not None else None,
            table_dtype=table_dtype or weight.dtype,
            hash_seed=sketch.hash_seed,
            device=weight.device,
            spans=sketch.spans,
        )
    model.set_submodule(path, made)
    return made


def densify(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace all sketched layers and experts by dense ones.

    Args:
        model: The sketched model, which is changed.
        dtype: Dtype of the weights. None: the dtype of the tables.
    """
    unfit_model(model)
    weights: dict[nn.Parameter, nn.Parameter] = {}  # tied modules get the same
    for path, module in list(model.named_modules()):
        if isinstance(module, SketchedExperts):
            dense_experts(module, dtype)
        elif isinstance(module, SketchedLinear | SketchedEmbedding):
            table = module.weight_table
            if table not in weights:
                weight = module.dense_weight().to(dtype)
                weights[table] = nn.Parameter(weight, requires_grad=False)
            dense: nn.Module
            if isinstance(module, SketchedEmbedding):
                dense = module.dense(weights[table])
            else:
                dense = _dense(module, weights[table])
            model.set_submodule(path, dense)


def _dense(module: SketchedLinear, weight: nn.Parameter) -> nn.Module:
    dense: nn.Module
    if module.shape.transposed:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            dense = Conv1D(module.out_features, module.in_features)  # type: ignore[no-untyped-call]
        weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
    else:
        dense = nn.Linear(module.in_features, module.out_features, device="meta")
    dense.register_parameter("weight", weight)
    dense.register_parameter("bias", module.bias)
    return dense
