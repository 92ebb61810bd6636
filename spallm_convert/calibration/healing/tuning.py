"""Sketch tables trained for a while: the optimizer, its schedule, and the best state so far."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from spallm_convert.runtime.linear import SketchedLinear, train_tables_only

#: AdamW's, of the distance between a table's entries, root mean square / entries. What is to be
#: gained is in proportion to that distance, and so may be what noisy steps lose: models with small
#: and with large weights, 2 bits and 4 take steps of the same consequence. The rate falls linearly
#: to zero after a tenth of the steps.
LEARNING_RATE = 1.2e-2
_BETAS = (0.9, 0.95)  # a few hundred steps: 0.999 would remember the first of them to the end

#: One of so many batches of the text is not trained on and tells what is gained.
HELD_OUT = 8


class TableTuner:
    """Trains the tables of a module's sketched layers, which are to be in float32.

    loss: on what is held out, as the tables are now. A short text is soon learned by heart, so the
    state that is best on what is held out counts, be it the first one. dtype: that tables are
    stored in.
    """

    def __init__(self, module: nn.Module, steps: int, loss: float, dtype: torch.dtype) -> None:
        train_tables_only(module)
        layers = {n: m for n, m in module.named_modules() if isinstance(m, SketchedLinear)}
        self._tables = {name: layer.weight_table for name, layer in layers.items()}
        rates = (LEARNING_RATE * _distance(table) for table in self._tables.values())
        self._optimizer = torch.optim.AdamW(
            [{"params": [t], "lr": r} for t, r in zip(self._tables.values(), rates, strict=True)],
            betas=_BETAS,
            weight_decay=0.0,
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: rate_factor(step, steps)
        )
        self._dtype = dtype
        self.least, self._best = loss, self._copies()

    def step(self, loss: Tensor) -> None:
        """One step down a loss; none if no table had to do with it, as of experts not chosen, or
        its gradient is not finite, of which the optimizer would never recover."""
        if not loss.requires_grad:
            return
        loss.backward()  # type: ignore[no-untyped-call]
        if nn.utils.clip_grad_norm_(self._tables.values(), 1.0).isfinite():
            self._optimizer.step()
            self._schedule.step()
        self._optimizer.zero_grad()

    @contextlib.contextmanager
    def as_stored(self) -> Iterator[None]:
        """Has tables rounded to their stored dtype in here, to be measured and offered."""
        wide = self._copies()
        self.put({name: table.to(self._dtype).float() for name, table in wide.items()})
        yield
        self.put(wide)

    def offer(self, loss: float) -> None:
        """The loss as the tables are now; keeps them if it is the least so far."""
        if loss < self.least:
            self.least, self._best = loss, self._copies()

    @torch.no_grad()
    def put(self, tables: dict[str, Tensor]) -> None:
        """Gives the layers other tables, by their names in the module."""
        for name, table in tables.items():
            self._tables[name].copy_(table)

    def put_best(self) -> dict[str, Tensor]:
        """Puts the best tables back and gives them: float32 [out_features, groups, 2^bits]."""
        self.put(self._best)
        return self._best

    def _copies(self) -> dict[str, Tensor]:
        return {name: table.detach().clone() for name, table in self._tables.items()}


def rate_factor(step: int, steps: int) -> float:
    """Share of the learning rate in a step: up over a tenth of the steps, then down to zero."""
    warm_up = max(1, steps // 10)
    return min((step + 1) / warm_up, max(0.0, (steps - step) / max(1, steps - warm_up)))


def split_batches(batches: int) -> tuple[list[int], list[int]]:
    """Which of at least two batches are trained on, and which are held out."""
    assert batches > 1
    return [n for n in range(batches) if n % HELD_OUT], list(range(0, batches, HELD_OUT))


def shuffled_forever(pieces: list[int], seed: int) -> Iterator[int]:
    """Pieces in random order, each once before any comes again."""
    generator = np.random.default_rng(seed)
    while True:
        yield from (pieces[n] for n in generator.permutation(len(pieces)).tolist())


def _distance(table: Tensor) -> float:
    """About that between entries."""
    return table.detach().square().mean().sqrt().item() / table.shape[-1]
