"""Give sketched layers their dtypes again after loading.

transformers loads the tensors of some layers in float32, whatever the dtype of the model is: each
model class lists names. Tables of several dtypes could not be sharded together, and would all be
saved in float32. Some versions cast the index map too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .parameters import Place, sketched_pairs


def table_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype of each table of a model, by the name of the table.

    Args:
        model: The model, before its weights are loaded.
    """
    return {pair.key: pair.table.parameter.dtype for pair in sketched_pairs(model)}


def restore_dtypes(model: nn.Module, tables: Mapping[str, torch.dtype]) -> None:
    """Cast index maps to uint8 and tables to their dtypes.

    Args:
        model: The model, whose weights are loaded. Parameters on the meta device are offloaded, and
            stay as they are.
        tables: Dtype of each table by its name.
    """
    for pair in sketched_pairs(model):
        _cast(pair.index_map, torch.uint8)
        _cast(pair.table, tables[pair.key])


def _cast(place: Place, dtype: torch.dtype) -> None:
    old = place.parameter
    if old.dtype != dtype and not old.is_meta:
        new = nn.Parameter(old.data.to(dtype), requires_grad=False)
        setattr(place.module, place.name, new)
