"""Give vLLM the weights of a sketched checkpoint in a form that its own loaders can place.

Layers that compute with sketches get labels (see `labels.py`). A sketched weight that no layer has
asked for, because vLLM's model builds that layer in a way that no plugin can change, is served
dense: it is looked up here, and one warning names it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spallm_kernels import dequantize

from .labels import StoredWeights


@dataclass
class WeightStream:
    """Turn the tensors of a checkpoint into labels, dense weights, and others as they are.

    Attributes:
        stored: The weights of the checkpoint.
        labelled: Names of the stored weights that layers have asked for: index maps, and dense
            weights that are joined with sketched ones.
        dtype: Dtype of weights that are served dense.
        dense: Names of modules that were looked up, filled while tensors are read.
    """

    stored: StoredWeights
    labelled: Collection[str]
    dtype: torch.dtype
    dense: list[str] = field(default_factory=list)

    def weights(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors for vLLM, in the order of the given ones.

        Args:
            tensors: Names and tensors as they are in the checkpoint.
        """
        modules = self.stored.modules
        tables = {module.table_name(name) for name, module in modules.values()}
        for name, tensor in tensors:
            if name in tables:
                continue
            if name in self.labelled:
                yield name, self.stored.labels(name)
            elif name not in modules:
                yield name, tensor
            elif name not in self.stored.elsewhere:
                self.dense.append(modules[name][0])
                yield name, self._look_up(name)

    def _look_up(self, weight: str) -> Tensor:
        """Return the dense weight of a sketched module as the source stores it."""
        _, module = self.stored.modules[weight]
        labels = self.stored.labels(weight)
        columns = range(module.in_features)
        (run,) = self.stored.runs((labels.mT if module.transposed else labels).flatten())
        packed, table = self.stored.read_sketched(run, columns)
        dense = dequantize(packed, table.to(self.dtype), module.in_features)
        if module.experts is not None:
            dense = dense.view(module.experts, module.out_features, module.in_features)
        return dense.mT.contiguous() if module.transposed else dense
