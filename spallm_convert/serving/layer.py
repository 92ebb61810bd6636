"""Keep what a layer in vLLM knows of its sketches, from building the model to serving it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .labels import ABSENT, StoredWeights
from .products import Product, make_products


class LayerSketch:
    """Place labels in a layer while weights are loaded, and rows of sketches afterwards.

    Args:
        prefix: Name of the layer in vLLM, for messages.
        weights: Names of the stored weights that it consists of.

    Attributes:
        stored: The stored weights; set when loading begins.
        products: What the layer computes; set when loading ends.
        columns: The columns of the weights that this rank has.
        dtype: Dtype of activations.
    """

    def __init__(self, prefix: str, weights: list[str]) -> None:
        self.prefix = prefix
        self.weights = weights
        self.stored: StoredWeights | None = None
        self.products: list[Product] = []
        self.columns = range(0)
        self.dtype = torch.float32

    def expect(self, layer: nn.Module, rows: tuple[int, ...], loader: Any, name: str) -> None:
        """Register a parameter that vLLM fills with labels, [..., rows, 1].

        Args:
            layer: The layer.
            rows: Shape of the labels, without the last dimension.
            loader: vLLM's function that places rows.
            name: Name of the parameter.
        """
        labels = nn.Parameter(
            torch.full((*rows, 1), ABSENT, dtype=torch.int64, device="cpu"), requires_grad=False
        )

        # vLLM passes these two by position or by name.
        def place(param: nn.Parameter, loaded_weight: Tensor, *shard: Any, **options: Any) -> Any:
            if loaded_weight.dtype != torch.int64:
                raise ValueError(
                    f"{self.prefix}: sketched weights are placed by their rows, found "
                    f"{loaded_weight.dtype} {list(loaded_weight.shape)}; serve with --load-format "
                    f"auto, hf or safetensors"
                )
            return loader(param, loaded_weight, *shard, **options)

        labels.weight_loader = place  # type: ignore[attr-defined]
        labels.output_dim = len(rows) - 1  # type: ignore[attr-defined]
        layer.register_parameter(name, labels)
        self._loader = loader

    def read(self, layer: Any, device: torch.device, *, is_padded: bool = False) -> None:
        """Replace the labels of a layer, its parameter `weight`, by the rows that they name.

        Args:
            layer: The layer.
            device: Device of the new parameters.
            is_padded: As for `read_rows`.
        """
        labels = layer.weight.data
        del layer.weight
        self.products = self.read_rows(layer, labels.flatten(), device, is_padded=is_padded)
        for parameter in layer.parameters(recurse=False):
            if parameter.dtype == torch.uint8:
                parameter.weight_loader = _keep
        table = getattr(layer, "weight_table", None)
        if table is not None:
            table.weight_loader = functools.partial(self._replace, layer)

    def _replace(
        self, layer: nn.Module, table: nn.Parameter, loaded_weight: Tensor, *shard: Any
    ) -> None:
        """Replace the tables of a stored module, in the memory that they have.

        Trainers push the parameters of their model into a running engine: `model.load_weights`.

        Args:
            layer: The layer.
            table: The parameter that the name belongs to.
            loaded_weight: The tables, float [out_features, groups, 2^bits].
            shard: Which part of a joined layer they are for, as vLLM says it.
        """
        assert self.stored is not None
        rows = sum(product.rows for product in self.products)
        # vLLM places row numbers where it would place rows.
        numbers = nn.Parameter(
            torch.full((rows, 1), -1, dtype=torch.int64, device="cpu"), requires_grad=False
        )
        numbers.output_dim = 0  # type: ignore[attr-defined]
        self._loader(numbers, torch.arange(len(loaded_weight), device="cpu").unsqueeze(1), *shard)
        found = numbers.flatten()
        start = 0
        for product in self.products:
            first = 0
            for run in product.runs:
                here = found[start : start + len(run.rows)]
                if product.table is not None and run.weight is not None and (here >= 0).all():
                    values = self.stored.read_tables(run, self.columns, loaded_weight.cpu())
                    own = getattr(layer, product.table).data[first : first + len(run.rows)]
                    own.copy_(values)
                start += len(run.rows)
                first += len(run.rows)

    def read_rows(
        self, layer: nn.Module, labels: Any, device: torch.device, *, is_padded: bool = False
    ) -> list[Product]:
        """Read the rows of labels and register their parameters.

        Args:
            layer: The layer.
            labels: int64 [rows].
            device: Device of the new parameters.
            is_padded: Whether rows may be absent. Their products are zero.

        Returns:
            The products.

        Raises:
            ValueError: If rows are absent.
        """
        absent = int((labels == ABSENT).sum())
        if self.stored is None or absent == len(labels) or (absent and not is_padded):
            raise ValueError(
                f"{self.prefix}: {absent} of {len(labels)} rows got no weights; serve with "
                f"--load-format auto, hf or safetensors"
            )
        products = make_products(layer, labels, self.stored, self.columns, self.dtype, device)
        self.stored.forget()
        return products


def _keep(parameter: nn.Parameter, loaded_weight: Tensor, *shard: Any) -> None:
    """Keep an index map, which training does not change."""
