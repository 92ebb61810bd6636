"""Put the sketched rows of stored weights together, in whatever order they come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spallm_convert.sketch.layer import Layer

from .blocks.targets import Segment
from .layers import SketchedLayer


@dataclass
class AssembledLayer:
    """Hold the sketch of a stored weight.

    Attributes:
        layer: The stored weight.
        index_map: Packed codes, uint8 [rows, row_bytes]. Experts lie below each other.
        table: Tables in their stored dtype, [rows, groups, 2^bits].
        sums: Squared error and squared norm of the weights, then of the outputs.
        reduced: Number of table values that were reduced to the limit of the dtype that the model
            loads in.
        missing: Number of rows that are not sketched yet.
    """

    layer: Layer
    index_map: np.ndarray[Any, np.dtype[np.uint8]]
    table: np.ndarray[Any, Any]
    sums: list[float]
    reduced: int
    missing: int


@dataclass
class AssembledLayers:
    """Collect sketched rows until layers are complete.

    Attributes:
        begun: Layers of which some rows are missing, by name.
    """

    begun: dict[str, AssembledLayer] = field(default_factory=dict)

    def add(self, segment: Segment, sketched: SketchedLayer) -> Iterator[AssembledLayer]:
        """Add sketched rows, and yield their layer if it is complete.

        Args:
            segment: Where the rows lie in their layer.
            sketched: The rows.
        """
        rows, module = sketched.rows, segment.layer.module
        error, norm = rows.sums.sum(axis=0).tolist()
        sums = [error, norm, *sketched.output_sums]
        layer = self.begun.pop(segment.layer.name, None)
        if layer is None and segment.rows == module.rows:  # nothing to put together
            yield AssembledLayer(segment.layer, rows.index_map, rows.table, sums, rows.reduced, 0)
            return
        if layer is None:
            index_map, table = (
                np.empty((module.rows, *part.shape[1:]), part.dtype)
                for part in (rows.index_map, rows.table)
            )
            layer = AssembledLayer(segment.layer, index_map, table, [0.0] * 4, 0, module.rows)
        place = slice(segment.stored, segment.stored + segment.rows)
        layer.index_map[place], layer.table[place] = rows.index_map, rows.table
        layer.sums = [total + own for total, own in zip(layer.sums, sums, strict=True)]
        layer.reduced += rows.reduced
        layer.missing -= segment.rows
        if layer.missing:
            self.begun[segment.layer.name] = layer
        else:
            yield layer
