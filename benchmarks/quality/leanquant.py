"""Rebuild LeanQuant's recipe (arXiv 2407.10032) from parts of this project.

Every row has its own table, from k-means with weights diag(chol(H^-1))^-p. Codes are chosen column
by column in the order of descending diagonal, each compensating the error of the columns before it
(GPTQ's loop). H = X^T X of a layer's inputs, computed after the layers before it have been
quantized; layers that read the same tensor share it. A tenth of the mean diagonal of H is added to
its diagonal. Tables are float16.

There are two differences from the published code. Our k-means is exact; theirs is scikit-learn's.
Our codes take their own number of bits; theirs take a nibble at 3 and 2 bits too.
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
#: p by bits, from the authors' instructions.
POWERS = {4: 4.0, 3: 3.0, 2: 3.0}

Singles = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]


def quantize_layer(weights: Singles, hessian: Floats, bits: int) -> tuple[Singles, Any]:
    """Return tables, float32 [rows, 1, 2^bits] of float16 values, and codes, uint8 [rows, n]."""
    prepared = prepare_hessian(hessian, DAMPING)
    table, _ = kmeans(weights, importance(prepared, POWERS[bits]), 1, 2**bits)
    rounded = table.astype(np.float16).astype(np.float32)
    return rounded, compensate(weights, rounded, prepared)


@torch.no_grad()
def quantize_blocks(
    blocks: Blocks, linears: Sequence[str], bits: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the layers of a model, by path, as float32 weights [out_features, in_features]."""
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
    """Return layers in the order a block calls them, grouped by the tensor that they read."""
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
    """Return X^T X of a layer's inputs, float64 [in_features, in_features]."""
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
    """Call `see` with the input of a layer whenever the layer runs."""
    handle = block.get_submodule(name).register_forward_pre_hook(lambda _, args: see(args[0]))
    try:
        yield
    finally:
        handle.remove()
