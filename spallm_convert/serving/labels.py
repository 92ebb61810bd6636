"""Label the rows of stored weights, and read the rows that have given labels.

vLLM knows where each row of a weight belongs: it joins projections, splits them between the ranks
of tensor parallelism, repeats the rows of key and value heads, and numbers experts, with other code
for many models. A sketched row has another size than a dense one, and parts of one layer may differ
in their bits. So vLLM gets labels to place, one per row, in the shape of the dense weight with a
single input. When it is done, the labels of a layer say which stored rows it consists of.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spallm_formats import (
    SketchedCheckpoint,
    SketchedModule,
    fingerprint,
    map_digest,
    pack,
    read_bytes,
    tables_digest,
    unpack,
)

#: A label is the number of a weight, from 1, in the high bits, and the number of a row in the low
#: ones. The label 0 is an absent row, which pads a weight: its products are zero.
_ROW_BITS = 40
ABSENT = 0
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}
_KEPT = 4  # gate, up, and their tables


class Run(NamedTuple):
    """Describe consecutive rows of a layer that belong to one stored weight.

    Attributes:
        weight: Name of the stored tensor, of the index map if it is sketched. None: absent rows.
        rows: Numbers of the rows in the stored weight, int64 [rows].
    """

    weight: str | None
    rows: Tensor


class SketchedRows(NamedTuple):
    """Hold rows of a sketched weight.

    Attributes:
        packed: Packed codes, uint8 [rows, row_bytes].
        table: Tables, float [rows, groups, 2^bits].
    """

    packed: Tensor
    table: Tensor


class StoredWeights:
    """Number the weights of a sketched checkpoint, and read their rows.

    Args:
        checkpoint: The checkpoint.
        dense: Names of dense weights that may be labelled, [out_features, in_features].
        elsewhere: Names of weights that belong to layers of other ranks.

    Attributes:
        modules: Names and shapes of the sketched modules, by name of the index map.
        elsewhere: As given.
    """

    def __init__(
        self,
        checkpoint: SketchedCheckpoint,
        dense: Iterable[str] = (),
        elsewhere: Iterable[str] = (),
    ) -> None:
        self.elsewhere = frozenset(elsewhere)
        modules = checkpoint.metadata.modules
        self.modules = {m.index_map_name(name): (name, m) for name, m in modules.items()}
        self._checkpoint = checkpoint
        self._names = [*self.modules, *sorted(dense)]
        self._numbers = {name: number for number, name in enumerate(self._names, 1)}
        self._read: dict[str, Tensor] = {}  # tensors that were read last

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return the fingerprint of the index maps. The first use reads all of them."""
        metadata = self._checkpoint.metadata
        if metadata.mapping == "hash":
            digests = dict.fromkeys(metadata.modules, map_digest(None, metadata.hash_seed))
        else:
            digests = {
                name: map_digest(np.ascontiguousarray(self._checkpoint.index_map(name)), None)
                for name in metadata.modules
            }
        return fingerprint(metadata.modules, digests)

    @functools.cached_property
    def tables_digest(self) -> str:
        """Return the digest of the tables. The first use reads all of them."""
        names = sorted((name, weight) for weight, (name, _) in self.modules.items())

        def rounded(weight: str) -> Any:
            table = self.table(weight).to(torch.bfloat16)
            return table.contiguous().view(torch.uint8).numpy()

        return tables_digest((name, rounded(weight)) for name, weight in names)

    def table(self, weight: str) -> Tensor:
        """Return the tables of a sketched weight as they are stored."""
        name, module = self.modules[weight]
        return self._tensor(module.table_name(name))

    def labels(self, weight: str) -> Tensor:
        """Return a label per row of a stored weight, int64.

        The shape is that of the dense weight, with one input instead of all.

        Args:
            weight: Name of the stored tensor.
        """
        shape = self._dense_shape(weight)
        rows, leading = shape[-2], shape[:-2]
        labels = torch.arange(math.prod(leading) * rows, device="cpu")
        labels = (labels + (self._numbers[weight] << _ROW_BITS)).view(*leading, rows, 1)
        is_transposed = weight in self.modules and self.modules[weight][1].transposed
        return labels.mT if is_transposed else labels

    def runs(self, labels: Tensor) -> Iterator[Run]:
        """Yield consecutive rows of a layer that belong to one stored weight.

        Args:
            labels: The labels of the rows, int64 [rows].
        """
        labels = labels.cpu()
        numbers, counts = torch.unique_consecutive(labels >> _ROW_BITS, return_counts=True)
        rows = torch.split(labels & ((1 << _ROW_BITS) - 1), counts.tolist())
        for number, part in zip(numbers.tolist(), rows, strict=True):
            yield Run(self._names[number - 1] if number else None, part)

    def read_sketched(self, run: Run, columns: range) -> SketchedRows:
        """Read the sketch of rows. Codes of the `hash` mapping are computed and packed.

        Args:
            run: The rows of a sketched weight.
            columns: The columns to keep. If they cut a group, its pieces become groups, which have
                equal sizes and copies of its tables.
        """
        assert run.weight is not None
        name, module = self.modules[run.weight]
        metadata = self._checkpoint.metadata
        tables = self._tensor(module.table_name(name))
        table = tables.view(module.rows, module.groups_per_row, module.entries)[run.rows]
        if metadata.mapping == "hash":
            codes = _hashed(run.rows, module, metadata.hash_seed)
            packed = torch.from_numpy(pack(codes, module.bits))
        else:
            packed = self._tensor(run.weight).flatten(0, -2)[run.rows]
        if len(columns) == module.in_features:
            return SketchedRows(packed, table)
        return SketchedRows(
            _cut_codes(packed, module, columns), _cut_groups(table, module, columns)
        )

    def read_dense(self, run: Run, columns: range) -> Tensor:
        """Read rows of a dense weight, float [rows, columns].

        Args:
            run: The rows.
            columns: The columns to keep.
        """
        assert run.weight is not None
        return self._tensor(run.weight)[run.rows, columns.start : columns.stop]

    def read_tables(self, run: Run, columns: range, stored: Tensor) -> Tensor:
        """Return the tables of rows, float [rows, groups, 2^bits], of another set.

        Args:
            run: The rows of a sketched weight.
            columns: As for `read_sketched`.
            stored: All tables of the stored module in the set.
        """
        assert run.weight is not None
        _, module = self.modules[run.weight]
        table = stored.reshape(module.rows, module.groups_per_row, module.entries)[run.rows]
        if len(columns) == module.in_features:
            return table
        return _cut_groups(table, module, columns)

    def forget(self) -> None:
        """Free the tensors that are kept for further rows of the same weights."""
        self._read.clear()

    def _dense_shape(self, weight: str) -> tuple[int, ...]:
        """Return the shape of a dense weight with a row per output."""
        if weight not in self.modules:
            return self._checkpoint.tensors[weight].shape
        module = self.modules[weight][1]
        leading = () if module.experts is None else (module.experts,)
        return *leading, module.out_features, module.in_features

    def _tensor(self, name: str) -> Tensor:
        """Read a stored tensor. Experts take turns with few tensors, so the last ones are kept."""
        if name not in self._read:
            if len(self._read) == _KEPT:
                self._read.clear()
            stored = self._checkpoint.tensors[name]
            data = read_bytes(stored, 0, stored.nbytes)
            dtype = _DTYPES[stored.dtype]
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            self._read[name] = flat.reshape(stored.shape)
        return self._read[name]


def split_columns(module: SketchedModule, columns: int) -> int:
    """Return the groups per row of a part of the columns.

    Args:
        module: The whole module.
        columns: Number of columns of each part. Parts are equal.
    """
    return columns // math.gcd(columns, module.in_features // module.groups_per_row)


def _cut_codes(packed: Tensor, module: SketchedModule, columns: range) -> Tensor:
    codes = unpack(packed.contiguous().numpy(), module.bits, module.in_features)
    return torch.from_numpy(
        pack(np.ascontiguousarray(codes[:, columns.start : columns.stop]), module.bits)
    )


def _cut_groups(table: Tensor, module: SketchedModule, columns: range) -> Tensor:
    groups = split_columns(module, len(columns))
    starts = columns.start + torch.arange(groups) * (len(columns) // groups)
    return table[:, starts // (module.in_features // module.groups_per_row)]


def _hashed(
    rows: Tensor, module: SketchedModule, seed: int
) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Compute the codes of rows. Rows that follow each other are computed in one call."""
    from spallm_kernels import hash_codes  # imports numba

    if not len(rows):
        return np.empty((0, module.in_features), np.uint8)
    breaks = (torch.diff(rows) != 1).nonzero().flatten() + 1
    parts = torch.tensor_split(rows, breaks.tolist())
    return np.concatenate(
        [hash_codes(len(p), module.in_features, module.bits, seed, int(p[0])) for p in parts]
    )
