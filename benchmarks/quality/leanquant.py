"""LeanQuant's recipe (arXiv 2407.10032), told again with the parts that this project has.

Every row has a table of its own, from k-means with weights diag(chol(H^-1))^-p; codes are chosen
column by column, in the order of descending diagonal, each making up for the error of those before
(GPTQ's loop). H = X^T X, with a tenth of its mean diagonal added to the diagonal, is of the inputs
that a layer has behind the layers that have been quantized already, layers that read the same
tensor together. Tables are float16.

It differs from the published code in this: k-means is exact, where theirs is scikit-learn's, and a
code takes its own number of bits, where theirs takes a nibble at 3 and 2 bits too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.calibration.blocks.stand_ins import StopForward
from spallm_kernels import compensate, importance, kmeans, look_up, prepare_hessian

DAMPING = 0.1
#: p by bits, as the authors' instructions have it.
POWERS = {4: 4.0, 3: 3.0, 2: 3.0}

Singles = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]


def quantize_layer(weights: Singles, hessian: Floats, bits: int) -> tuple[Singles, Any]:
    """Tables, float32 [rows, 1, 2^bits] of float16 values, and codes, uint8 [rows, columns]."""
    prepared = prepare_hessian(hessian, DAMPING)
    table, _ = kmeans(weights, importance(prepared, POWERS[bits]), 1, 2**bits)
    rounded = table.astype(np.float16).astype(np.float32)
    return rounded, compensate(weights, rounded, prepared)


@torch.no_grad()
def quantize_blocks(
    blocks: Blocks, linears: Sequence[str], bits: int
) -> Iterator[tuple[str, Tensor]]:
    """The layers of a model, by path, as float32 weights [out_features, in_features]."""
    hidden = list(blocks.inputs)
    for number in range(len(blocks)):
        block, prefix = blocks.load(number), blocks.path_of(number) + "."
        names = [path.removeprefix(prefix) for path in linears if path.startswith(prefix)]
        for stage in input_order(blocks, number, block, names, hidden[0]):
            hessian = _input_sums(blocks, number, block, stage[0], hidden)
            for name in stage:
                linear: Any = block.get_submodule(name)
                table, codes = quantize_layer(linear.weight.numpy(), hessian, bits)
                dense = torch.from_numpy(look_up(table, codes))
                linear.weight.copy_(dense)
                yield prefix + name, dense
        for index, before in enumerate(hidden):
            hidden[index] = blocks.run(number, block, before)
        blocks.unload(number)


def input_order(
    blocks: Blocks, number: int, block: nn.Module, names: Sequence[str], hidden: Tensor
) -> list[list[str]]:
    """Layers in the order in which a block calls them, those that read the same tensor together."""
    stages: list[tuple[Tensor, list[str]]] = []

    def note(name: str, x: Tensor) -> None:
        if not stages or stages[-1][0] is not x:
            stages.append((x, []))
        stages[-1][1].append(name)

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(_watched(block, name, lambda x, name=name: note(name, x)))
        blocks.run(number, block, hidden)
    return [stage for _, stage in stages]


def _input_sums(
    blocks: Blocks, number: int, block: nn.Module, name: str, hidden: Sequence[Tensor]
) -> Floats:
    """X^T X of a layer's inputs, float64 [in_features, in_features]."""
    columns: Any = block.get_submodule(name).in_features
    hessian = np.zeros((columns, columns))

    def add(x: Tensor) -> None:
        nonlocal hessian
        flat = x.reshape(-1, columns)
        hessian += (flat.T @ flat).double().numpy()
        raise StopForward

    with _watched(block, name, add):
        for part in hidden:
            with contextlib.suppress(StopForward):
                blocks.run(number, block, part)
    return hessian


@contextlib.contextmanager
def _watched(block: nn.Module, name: str, see: Any) -> Iterator[None]:
    """Has `see` called with the input of a layer whenever the layer is run."""
    handle = block.get_submodule(name).register_forward_pre_hook(lambda _, args: see(args[0]))
    try:
        yield
    finally:
        handle.remove()
