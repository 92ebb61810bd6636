"""Train sketch tables for some steps: the optimizer, its schedule, and the best state so far."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from spallm_convert.errors import CalibrationError
from spallm_convert.runtime.linear import SketchedLinear, train_tables_only

#: AdamW's learning rate, as a multiple of the distance between a table's entries. The distance is
#: estimated as root mean square / number of entries. The possible gain is in proportion to it, so
#: the loss through noisy steps may be, too. With this unit, steps have the same effect for small
#: and large weights, and for 2 and 4 bits. The rate rises for a tenth of the steps, then falls
#: linearly to zero.
LEARNING_RATE = 1.2e-2
_BETAS = (0.9, 0.95)  # 0.999 would average over all of the few hundred steps

#: One of every 8 batches of the text is held out from training, to measure the gain.
HELD_OUT = 8


class TableTuner:
    """Trains the tables of a module's sketched layers and remembers the best ones.

    Training soon overfits to a short text. So the best tables are those with the smallest loss on
    held-out text, which may be the tables from before training.

    Args:
        module: The module, whose tables are float32.
        steps: Number of steps in all, for the schedule.
        loss: Held-out loss with the tables as they are now.
        dtype: The dtype that tables are stored in.

    Attributes:
        least: The smallest held-out loss so far.
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
        self._taken = self._skipped = 0
        self.least, self._best = loss, self._copies()

    def step(self, loss: Tensor) -> None:
        """Take one optimizer step.

        Skip it if the loss does not depend on any table (an unused expert, for example) or if the
        gradient is not finite: AdamW's moments would stay NaN.
        """
        if not loss.requires_grad:
            return
        loss.backward()  # type: ignore[no-untyped-call]
        if nn.utils.clip_grad_norm_(self._tables.values(), 1.0).isfinite():
            self._optimizer.step()
            self._schedule.step()
            self._taken += 1
        else:
            self._skipped += 1
        self._optimizer.zero_grad()

    def check_steps(self, where: str) -> None:
        """Raise CalibrationError if every step was skipped because of its gradient.

        Args:
            where: Path of the module that is trained, or name of the model, for the message.
        """
        if self._skipped and not self._taken:
            raise CalibrationError(
                f"{where}: not one of {self._skipped} gradients on the healing text is finite; "
                f"check the model with spallm-convert eval MODEL --text SRC, or leave out --heal"
            )

    @contextlib.contextmanager
    def as_stored(self) -> Iterator[None]:
        """Round the tables to their stored dtype during a `with` block, to measure the loss."""
        wide = self._copies()
        self.put({name: table.to(self._dtype).float() for name, table in wide.items()})
        yield
        self.put(wide)

    def offer(self, loss: float) -> None:
        """Take the held-out loss of the current tables; keep them if it is the smallest so far."""
        if loss < self.least:
            self.least, self._best = loss, self._copies()

    @torch.no_grad()
    def put(self, tables: dict[str, Tensor]) -> None:
        """Replace tables, by the names of their layers in the module."""
        for name, table in tables.items():
            self._tables[name].copy_(table)

    def put_best(self) -> dict[str, Tensor]:
        """Put the best tables back and return them: float32 [out_features, groups, 2^bits]."""
        self.put(self._best)
        return self._best

    def _copies(self) -> dict[str, Tensor]:
        return {name: table.detach().clone() for name, table in self._tables.items()}


def rate_factor(step: int, steps: int) -> float:
    """Return the factor of the learning rate in a step.

    It rises over a tenth of the steps, then falls to zero.
    """
    warm_up = max(1, steps // 10)
    return min((step + 1) / warm_up, max(0.0, (steps - step) / max(1, steps - warm_up)))


def split_batches(batches: int) -> tuple[list[int], list[int]]:
    """Return the numbers of the batches to train on and of those to hold out, of at least two."""
    assert batches > 1
    return [n for n in range(batches) if n % HELD_OUT], list(range(0, batches, HELD_OUT))


def shuffled_forever(pieces: list[int], seed: int) -> Iterator[int]:
    """Yield pieces in random order without end; each comes once before any comes again."""
    generator = np.random.default_rng(seed)
    while True:
        yield from (pieces[n] for n in generator.permutation(len(pieces)).tolist())


def _distance(table: Tensor) -> float:
    """Return the estimated distance between the entries of a table."""
    return table.detach().square().mean().sqrt().item() / table.shape[-1]
