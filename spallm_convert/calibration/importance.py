"""Measure how much the weights of each column matter: the mean square of the column's inputs.

An error e_j of the weight in column j changes the output of a row by e_j x_j. If the inputs x_j are
uncorrelated, the expected square of the output's error is the sum of E[x_j^2] e_j^2. Exact k-means
that is weighted by E[x_j^2] makes this sum as small as a table can.

The text runs through the dense model once, block by block. After each block, the hidden states and
what was measured are kept on disk, so an interrupted run continues there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save
from torch import Tensor

from spallm_convert.progress import Progress
from spallm_convert.sketch.layer import Layer
from spallm_convert.sketch.plan import Plan

from .blocks.blocks import Blocks
from .blocks.stages import check_states, check_sums, flat_inputs
from .blocks.targets import Target
from .blocks.watching import Note, watched
from .store import sound_files, write_sound

#: How much each column of a stored weight counts, float32 [1, columns], or [experts, columns] for
#: fused experts.
Importance = npt.NDArray[np.float32]

#: An expert counts as if it had seen this many more tokens, with the mean square of all experts.
_SHRINKAGE = 16
#: The least importance of a column, as a share of the mean of all columns. An input that is zero on
#: this text may not be zero on another.
_LEAST = 1e-4


@torch.no_grad()
def measure_importance(
    blocks: Blocks,
    plan: Plan,
    folder: Path,
    progress: Progress,
    *,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Importance]:
    """Run the text through the dense model, and measure the inputs of every layer.

    Args:
        blocks: The dense model. Its `inputs` are taken.
        plan: The layers to sketch.
        folder: Where to keep what is measured. What an earlier run left there is used.
        progress: Is told about every block.
        check: Called before anything is kept. It raises an error if the source has changed.

    Returns:
        The importance of the columns by name of the layer. Layers that the text does not run
        through have none.

    Raises:
        CalibrationError: Inputs or hidden states are not finite.
    """
    found: dict[str, Importance] = {}
    stream, first = blocks.take_inputs(), 0
    # A second list of blocks needs the outputs of the first, which are not kept.
    kept = _Kept(folder) if blocks.next is None else None
    if kept is not None and (resumed := kept.read(len(stream))) is not None:
        first, stream, found = resumed
    for listed in blocks.lists:
        if listed is not blocks:
            stream, _ = listed.enter(stream, stream)
        for number in range(first, len(listed)):
            progress.say(f"measuring the inputs of block {number + 1} of {len(listed)}")
            measured = _measure_block(listed, number, plan.layers.values(), stream)
            found |= measured
            if kept is not None:
                check()
                kept.write(number, measured, stream)
    return found


def _measure_block(
    blocks: Blocks, number: int, layers: Iterable[Layer], stream: list[Tensor]
) -> dict[str, Importance]:
    """Run a block, replace the stream by its outputs, and return the importance of its layers."""
    targets = blocks.targets(number, layers)
    sums = {name: _Squares(target, blocks.device) for name, target in targets.items()}
    notes: dict[str, Note] = {name: found.add for name, found in sums.items()}
    block = blocks.load(number)
    with watched(block, notes, targets):
        for batch, hidden in enumerate(stream):
            stream[batch] = blocks.run(number, block, hidden, batch).cpu()
            check_states(blocks.path_of(number), stream[batch])
    blocks.unload(number)
    found: dict[str, list[Importance]] = {}
    for name, target in targets.items():
        means = sums[name].means()
        for segment in target.segments():
            listed = found.setdefault(segment.layer.name, [])
            expert = segment.stored // segment.layer.module.out_features
            if len(listed) == expert or segment.layer.module.experts is None:
                listed[expert:] = [means[segment.expert]]
    return {name: np.stack(rows) for name, rows in found.items()}


class _Squares:
    """Sum the squares of the inputs of a parameter.

    Args:
        target: The parameter.
        device: Where its inputs are.
    """

    def __init__(self, target: Target, device: torch.device) -> None:
        experts = target.weight.experts or 1
        shape = experts, target.weight.in_features
        self._path = target.path
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self._counts = torch.zeros(experts, dtype=torch.float64, device=device)

    def add(self, expert: int, x: Tensor, _: Tensor) -> None:
        """Add inputs of an expert, [..., columns]; 0 without experts."""
        squares = flat_inputs(x).square()
        self._sums[expert] += squares.sum(0, dtype=torch.float64)
        # Llama 4 gives every expert zeros in place of the tokens of others.
        self._counts[expert] += squares.any(1).sum()
        # Here, not in `means`, so that the error names the layer where it starts.
        check_sums(self._path, self._sums[expert])

    def means(self) -> Importance:
        """Return the mean squares, float32 [experts, columns], none of them far below the others.

        If no input was seen, all are zero.
        """
        total = self._sums.sum(0) / self._counts.sum().clamp(min=1)
        means = (self._sums + _SHRINKAGE * total) / (self._counts[:, None] + _SHRINKAGE)
        least = _LEAST * means.mean(1, keepdim=True)
        return means.maximum(least).float().cpu().numpy()


class _Kept:
    """Keep what was measured, and the hidden states after the last block, in files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, number: int, measured: Mapping[str, Importance], stream: list[Tensor]) -> None:
        """Keep the importance of the layers of a block, and the hidden states after it."""
        write_sound(self._folder, _block(number), save(dict(measured)))
        states = {f"{number}.{batch}": states.numpy() for batch, states in enumerate(stream)}
        write_sound(self._folder, _STATES, save(states))

    def read(self, batches: int) -> tuple[int, list[Tensor], dict[str, Importance]] | None:
        """Return the number of the next block, its inputs, and all importance; None if damaged.

        Args:
            batches: Number of batches of the text.
        """
        for path in sound_files(self._folder, _STATES):
            states = load_file(path)
            number = int(next(iter(states), "0").partition(".")[0])
            files = [list(sound_files(self._folder, _block(n))) for n in range(number + 1)]
            if len(states) != batches or not all(files):
                continue
            stream = [torch.from_numpy(states[f"{number}.{batch}"]) for batch in range(batches)]
            found = [load_file(paths[0]) for paths in files]
            return number + 1, stream, {k: v for measured in found for k, v in measured.items()}
        return None


_STATES = "states"


def _block(number: int) -> str:
    return f"importance-{number}"
