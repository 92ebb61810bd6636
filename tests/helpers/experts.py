"""Make random sketched experts, and their products by plain indexing in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from helpers.sketches import Sketch, random_sketch


@dataclass(frozen=True)
class Experts:
    sketch: Sketch  # of the rows of all experts
    offsets: torch.Tensor

    @property
    def index_map(self):
        return self._by_expert(self.sketch.index_map)

    @property
    def table(self):
        return self._by_expert(self.sketch.table)

    def products(self, x, table):
        weights = self._by_expert(self.sketch.dense(table.flatten(0, 1)))
        spans = itertools.pairwise(self.offsets.tolist())
        parts = [x[s:e] @ weight.T for (s, e), weight in zip(spans, weights, strict=True)]
        return torch.cat([*parts, x.new_zeros(len(x) - self.offsets[-1], weights.shape[1])])

    def _by_expert(self, tensor):
        return tensor.unflatten(0, (len(self.offsets) - 1, -1))


def random_experts(bits, groups, counts, rows, columns, **options):
    """Return experts with a number of tokens each."""
    offsets = torch.tensor([0, *itertools.accumulate(counts)])
    return Experts(random_sketch(bits, groups, len(counts) * rows, columns, **options), offsets)
