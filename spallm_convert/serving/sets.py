"""Read a set of tables for the layers of a model in vLLM, and check that it belongs there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spallm_convert.errors import FormatError

from .labels import StoredWeights
from .products import Product
from .set_file import RefusedTablesError, SetFile


@dataclass(frozen=True)
class ServedLayer:
    """Hold a part of a layer whose tables a set replaces.

    Attributes:
        module: The module that has the parameters.
        products: Its products.
        columns: The columns of the weights that this rank has.
        takes_sets: Whether requests may have tables of their own here. If not, a set must have the
            tables of the base.
    """

    module: nn.Module
    products: Sequence[Product]
    columns: range
    takes_sets: bool


class TableSet:
    """Hold the tables of a set that this rank needs. vLLM takes it for an adapter.

    Attributes:
        id: vLLM's number of the set.
        tables: Tables by number of the layer and of the product, like the layer's own. None: the
            tables of the base, as vLLM needs them before it serves.
        loras: Nothing; vLLM looks here for low-rank adapters.
    """

    def __init__(self, number: int, tables: dict[tuple[int, int], Tensor] | None) -> None:
        self.id = number
        self.tables = tables
        self.loras: dict[str, Any] = {}


def read_set(
    file: BufferedReader,
    folder: Path,
    stored: StoredWeights,
    layers: Sequence[ServedLayer],
) -> dict[tuple[int, int], Tensor]:
    """Read the tables of an open file for the layers of this rank.

    Args:
        file: The tables file.
        folder: Its folder, for messages.
        stored: The weights of the base.
        layers: The layers of this rank.

    Returns:
        Tables by number of the layer and of the product.

    Raises:
        RefusedTablesError: If the set does not belong to the base, is damaged, or changes layers
            that cannot have tables of their own.
    """
    try:
        return _local(SetFile(file, folder, stored), stored, layers)
    except (FormatError, OSError) as error:
        raise RefusedTablesError(f"{folder}: {error}") from error
    finally:
        stored.forget()


def _local(
    found: SetFile, stored: StoredWeights, layers: Sequence[ServedLayer]
) -> dict[tuple[int, int], Tensor]:
    """Return the tables of this rank's rows; check those that must equal the base's."""
    tables: dict[tuple[int, int], Tensor] = {}
    served: set[str] = set()
    for number, layer in enumerate(layers):
        for place, product in enumerate(layer.products):
            if product.table is None or not layer.takes_sets:
                continue
            own = getattr(layer.module, product.table)
            tables[number, place] = _joined(product, own, layer.columns, stored, found)
            served.update(run.weight for run in product.runs if run.weight is not None)
    for weight, (name, _) in stored.modules.items():
        if weight in served or weight in stored.elsewhere:
            continue
        table = found.table(weight)
        if not torch.equal(table, stored.table(weight).to(table.dtype)):
            raise FormatError(
                f"{name} has other tables than the base, but this layer serves all requests with "
                f"those of the base; train with set_trainable(model, tables=...) without it"
            )
    return tables


def _joined(
    product: Product,
    own: Tensor,
    columns: range,
    stored: StoredWeights,
    found: SetFile,
) -> Tensor:
    parts = []
    for run in product.runs:
        if run.weight is None:
            parts.append(own.new_zeros(len(run.rows), *own.shape[-2:], device="cpu"))
            continue
        table = found.table(run.weight)
        parts.append(stored.read_tables(run, columns, table).to(own.dtype))
    joined = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)
    return joined.view(own.shape)


def fill(
    layers: Sequence[ServedLayer], slot: int, tables: Mapping[tuple[int, int], Tensor] | None
) -> None:
    """Copy the tables of a set into a slot of every layer.

    Args:
        layers: The layers of this rank.
        slot: Number of the slot.
        tables: The tables. None: those of the base.
    """
    for number, layer in enumerate(layers):
        for place, product in enumerate(layer.products):
            if product.slots is not None and product.table is not None:
                target = getattr(layer.module, product.slots)[slot]
                own = getattr(layer.module, product.table)
                target.copy_(own.data if tables is None else tables[number, place])


def put(layers: Sequence[ServedLayer], tables: Mapping[tuple[int, int], Tensor]) -> None:
    """Copy the tables of a set over those of the layers, in the memory that they have.

    Args:
        layers: The layers of this rank.
        tables: The tables by number of the layer and of the product.
    """
    for (number, place), values in tables.items():
        table = layers[number].products[place].table
        assert table is not None
        getattr(layers[number].module, table).data.copy_(values)


def own_tables(layers: Sequence[ServedLayer]) -> dict[tuple[int, int], Tensor]:
    """Return copies of the tables that layers have of their own, on the CPU.

    Args:
        layers: The layers of this rank.
    """
    return {
        (number, place): getattr(layer.module, product.table).data.to("cpu", copy=True)
        for number, layer in enumerate(layers)
        for place, product in enumerate(layer.products)
        if product.table is not None
    }
