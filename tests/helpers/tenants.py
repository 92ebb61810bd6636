"""Make random sets of tables for one index map, and their products by plain indexing in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from helpers.sketches import Sketch, random, random_sketch

#: Sets of tokens: one for each, runs that are longer and shorter than a tile, the base among them.
SETS = {
    "each its own": [3, 0, 2, 1],
    "uneven": [2, -1, 2, 0, 2, -1, 2, 2, 0, 2, 2, 3, 2],
    "one": [2] * 5,
    "the base": [-1] * 3,
    "one token": [1],
}


@dataclass(frozen=True)
class Tenants:
    sketch: Sketch  # with the tables of the base
    tables: torch.Tensor  # float64, already rounded to the dtype they stand for

    def products(self, x, sets, bias=None):
        owns = [self.sketch.table if number < 0 else self.tables[number] for number in sets]
        pairs = zip(x, owns, strict=True)
        y = torch.stack([self.sketch.dense(own) @ token for token, own in pairs])
        return y if bias is None else y + bias


def random_tenants(bits, groups, rows, columns, *, dtype=torch.float64, hash_seed=None, slots=4):
    sketch = random_sketch(bits, groups, rows, columns, dtype=dtype, hash_seed=hash_seed)
    return Tenants(sketch, random(slots, *sketch.table.shape, dtype=dtype, seed=bits))
