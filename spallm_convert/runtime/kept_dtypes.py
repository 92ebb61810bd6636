"""Give sketched layers their dtypes again after loading.

transformers loads the tensors of some layers in float32, whatever the dtype of the model is: each
model class lists names. Tables of several dtypes could not be sharded together, and would all be
saved in float32. Some versions cast the index map too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .linear import SketchedLinear


def table_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtypes of the tables of sketched layers, by path of the layer.

    Args:
        model: The model, before its weights are loaded.
    """
    return {
        path: module.weight_table.dtype
        for path, module in model.named_modules()
        if isinstance(module, SketchedLinear)
    }


def restore_dtypes(model: nn.Module, tables: Mapping[str, torch.dtype]) -> None:
    """Cast index maps to uint8 and tables to their dtypes.

    Args:
        model: The model, whose weights are loaded. Parameters on the meta device are offloaded, and
            stay as they are.
        tables: Dtypes of the tables by path of the layer.
    """
    for path, dtype in tables.items():
        module = model.get_submodule(path)
        _cast(module, "weight", torch.uint8)
        _cast(module, "weight_table", dtype)


def _cast(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    parameter = module._parameters[name]
    if parameter is not None and parameter.dtype != dtype and not parameter.is_meta:
        setattr(module, name, nn.Parameter(parameter.data.to(dtype), requires_grad=False))
