"""What of a sketched model is trained: all tables by default, some of them, norms too."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from spallm_convert.errors import OptionError

from .linear import SketchedLinear
from .tables import keep_apart, sketched_layers, sketched_model

#: Moments that AdamW keeps of each trained parameter, in its dtype.
_MOMENTS = 2


@dataclass(frozen=True, kw_only=True)
class TrainableSummary:
    """Counts of parameters and bytes of memory; `print` gives a few readable lines.

    weights: weights that the sketched layers stand for. optimizer_bytes: two moments of AdamW in
    the dtype of each trained parameter; gradient_bytes: one gradient. Activations are not counted.
    """

    weights: int
    trained_tables: int
    tables: int
    trained_others: int
    index_map_bytes: int
    table_bytes: int
    other_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    def __str__(self) -> str:
        trained = self.trained_tables + self.trained_others
        lines = [
            f"trainable: {trained:,} parameters, {trained / max(1, self.weights):.2%} of the "
            f"{self.weights:,} weights that are sketched",
            f"  sketch tables  {self.trained_tables:,} of {self.tables:,}",
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
    norms: bool = False,
    dtype: torch.dtype | None = torch.float32,
) -> TrainableSummary:
    """Chooses what is trained and freezes all else.

    tables: all of them, none, or those of modules whose name matches a pattern (`*` and `?` as in
    file names, for example "*.mlp.*"). dtype: of all tables once some are trained, as a checkpoint
    has them in one; None to leave it. In bfloat16 an update below 1/256 of a value is lost, and
    tables are small; products are computed in the dtype of the activations all the same. norms:
    scales and offsets of normalisation layers too. They keep their dtype, as activations follow it:
    to train them, load the model in float32 and compute in bfloat16 by autocast (`bf16=True` in
    Trainer). To be called before a model is sharded.
    Raises OptionError when a pattern matches no sketched module.
    """
    model = sketched_model(model)
    layers = sketched_layers(model)
    patterns = ["*"] if tables is True else [] if tables is False else tables
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    chosen = set()
    for pattern in patterns:
        matches = fnmatch.filter(layers, pattern)
        if not matches:
            raise OptionError(
                f"no sketched module matches {pattern!r}, for example {next(iter(layers))}"
            )
        chosen.update(matches)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, layer in layers.items():
        table = layer.weight_table
        if chosen and dtype not in (None, table.dtype):
            table.data = table.data.to(dtype)
            table.grad = None
        table.requires_grad_(name in chosen)
    for module in model.modules() if norms else ():
        if "Norm" in type(module).__name__:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
    keep_apart(model)
    return trainable_summary(model)


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Counts what of a sketched model is trained, and the memory that training it takes."""
    model = sketched_model(model)
    layers = [module for module in model.modules() if isinstance(module, SketchedLinear)]
    tables = [layer.weight_table for layer in layers]
    maps = [layer.weight for layer in layers]
    known = {id(parameter) for parameter in (*tables, *maps)}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    trained = [p for p in (*tables, *others) if p.requires_grad]
    trained_bytes = sum(p.nbytes for p in trained)
    return TrainableSummary(
        weights=sum(layer.in_features * layer.out_features for layer in layers),
        trained_tables=sum(p.numel() for p in tables if p.requires_grad),
        tables=sum(p.numel() for p in tables),
        trained_others=sum(p.numel() for p in others if p.requires_grad),
        index_map_bytes=sum(p.nbytes for p in maps),
        table_bytes=sum(p.nbytes for p in tables),
        other_bytes=sum(p.nbytes for p in others) + sum(b.nbytes for b in model.buffers()),
        gradient_bytes=trained_bytes,
        optimizer_bytes=_MOMENTS * trained_bytes,
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
