"""Choose the trainable parameters of a sketched model, and count them.

By default all tables are trained. The choice may be some tables, a shift and a scale for each of
these tables in place of their entries, and normalization layers too.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from spallm_convert.errors import OptionError

from .affine import add_affine, check_affine_possible
from .parameters import Pair, sketched_model, sketched_pairs
from .table_sets import TableSets

#: Moments that AdamW keeps of each trainable parameter, in the parameter's dtype.
_MOMENTS = 2


@dataclass(frozen=True, kw_only=True)
class TrainableSummary:
    """Hold counts of parameters and bytes of memory; `print` shows them in a few lines.

    Memory of activations is not counted.

    Attributes:
        weights: Dense weights that the sketched layers represent.
        trained_tables: Trainable table entries.
        tables: All table entries.
        trained_affine: Trainable shifts and scales of tables.
        trained_others: Other trainable parameters.
        index_map_bytes: Bytes of the index maps.
        table_bytes: Bytes of the tables, with their shifts and scales.
        other_bytes: Bytes of all other parameters and of buffers.
        gradient_bytes: Bytes of one gradient of each trainable parameter.
        optimizer_bytes: Bytes of two moments of AdamW for each trainable parameter, in its dtype.
    """

    weights: int
    trained_tables: int
    tables: int
    trained_affine: int
    trained_others: int
    index_map_bytes: int
    table_bytes: int
    other_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    def __str__(self) -> str:
        trained = self.trained_tables + self.trained_affine + self.trained_others
        affine = [f"  shifts, scales {self.trained_affine:,}"] if self.trained_affine else []
        lines = [
            f"trainable: {trained:,} parameters, {trained / max(1, self.weights):.2%} of the "
            f"{self.weights:,} weights that are sketched",
            f"  sketch tables  {self.trained_tables:,} of {self.tables:,}",
            *affine,
            f"  others         {self.trained_others:,}",
            f"memory without activations: {_megabytes(self._bytes())}",
            f"  index maps     {_megabytes(self.index_map_bytes)}",
            f"  sketch tables  {_megabytes(self.table_bytes)}",
            f"  the rest       {_megabytes(self.other_bytes)}",
            f"  gradients      {_megabytes(self.gradient_bytes)}",
            f"  AdamW          {_megabytes(self.optimizer_bytes)}",
        ]
        return "\n".join(lines)

    def _bytes(self) -> int:
        model = self.index_map_bytes + self.table_bytes + self.other_bytes
        return model + self.gradient_bytes + self.optimizer_bytes


def set_trainable(
    model: nn.Module,
    tables: bool | str | Iterable[str] = True,
    *,
    affine: bool = False,
    norms: bool = False,
    dtype: torch.dtype | None = torch.float32,
) -> TrainableSummary:
    """Choose the trainable parameters of a sketched model, and freeze all others.

    Call this before the model is sharded.

    Args:
        model: A model from `load_sketched`, also inside wrappers such as DDP or torch.compile.
        tables: True: all tables. False: none. A pattern, or several: the tables of modules whose
            name in the checkpoint matches (`*` and `?` as in file names, for example "*.mlp.*").
            transformers loads all experts of a block as one, so they are chosen together.
        affine: Train a shift and a scale for each of these tables, and freeze their entries. A
            layer then computes with shift + scale * table. At first, shifts are 0 and scales 1.
            They are parameters of the layer, named like its tables with "_shift" and "_scale" in
            place of "_table". A step of a scale changes a weight by the step times the weight, so
            scales need a higher learning rate than tables and shifts: some 1 / 0.02 times as high
            if the weights are about 0.02.
        norms: Train scales and offsets of normalization layers too. They keep their dtype, because
            the dtype of the activations follows from it. To train them, load the model in float32
            and compute in bfloat16 with autocast (`bf16=True` in Trainer).
        dtype: Dtype to cast the tables of all sets to if any table is trained, with their shifts
            and scales; a checkpoint stores all tables in one dtype. None: keep the dtype. In
            bfloat16, an update smaller than 1/256 of a value is lost. Float32 tables cost little
            memory, and products are still computed in the dtype of the activations.

    Returns:
        The number of trainable parameters and the memory that training takes.

    Raises:
        OptionError: If a pattern matches no sketched module, the model has none, or the patterns
            match some of the modules that transformers loads as one, but not all. Or if the tables
            of the base are chosen and affine sets use them, or `affine` needs new parameters and
            the model is sharded or offloaded.
    """
    model = sketched_model(model)
    pairs = sketched_pairs(model)
    patterns = ["*"] if tables is True else [] if tables is False else tables
    chosen = _chosen(pairs, [patterns] if isinstance(patterns, str) else list(patterns))
    sets = TableSets.of(model)
    if chosen and affine:
        check_affine_possible(sets)
        sets = add_affine(model)
    elif chosen:
        sets.check_base_trainable()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if chosen and dtype is not None:
        sets.cast_tables(dtype)
    for pair in pairs:
        for place in pair.affine.values() if affine else [pair.table]:
            place.parameter.requires_grad_(pair.key in chosen)
    for module in model.modules() if norms else ():
        if "Norm" in type(module).__name__:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
    sets.keep_apart()
    return trainable_summary(model)


def _chosen(pairs: list[Pair], patterns: list[str]) -> set[str]:
    """Return the keys of the tables whose modules match any pattern."""
    names = list(dict.fromkeys(span.name for pair in pairs for span in pair.sketch.spans))
    matching: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise OptionError(f"no sketched module matches {pattern!r}; names are like {names[0]}")
        matching.update(matches)
    chosen = set()
    for pair in pairs:
        parts = [span.name for span in pair.sketch.spans]
        others = [name for name in parts if name not in matching]
        if others and len(others) < len(parts):
            found = next(name for name in parts if name in matching)
            raise OptionError(
                f"the tables of {found} and {others[0]} are one parameter of the model, expected "
                f"patterns that match all of its {len(parts)} modules or none; with a star in "
                f"place of the number of an expert, a pattern matches all experts"
            )
        if not others:
            chosen.add(pair.key)
    return chosen


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Count the trainable parameters of a sketched model and the memory that training takes.

    Args:
        model: A model from `load_sketched`, also inside wrappers such as DDP or torch.compile.

    Returns:
        Counts of parameters, and bytes of memory.

    Raises:
        OptionError: If the model has no sketched layers.
    """
    model = sketched_model(model)
    pairs = sketched_pairs(model)
    tables = [pair.table.parameter for pair in pairs]
    maps = [pair.index_map.parameter for pair in pairs]
    affine = [place.parameter for pair in pairs for place in pair.affine.values()]
    known = {id(parameter) for parameter in (*tables, *maps, *affine)}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    trained = [p for p in (*tables, *affine, *others) if p.requires_grad]
    trained_bytes = sum(p.nbytes for p in trained)
    return TrainableSummary(
        weights=sum(pair.sketch.shape.weights for pair in pairs),
        trained_tables=sum(p.numel() for p in tables if p.requires_grad),
        tables=sum(p.numel() for p in tables),
        trained_affine=sum(p.numel() for p in affine if p.requires_grad),
        trained_others=sum(p.numel() for p in others if p.requires_grad),
        index_map_bytes=sum(p.nbytes for p in maps),
        table_bytes=sum(p.nbytes for p in (*tables, *affine)),
        other_bytes=sum(p.nbytes for p in others) + sum(b.nbytes for b in model.buffers()),
        gradient_bytes=trained_bytes,
        optimizer_bytes=_MOMENTS * trained_bytes,
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
