"""Launch the Triton kernels with given tiles against the default ones, for `tune.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from spallm_kernels.operators import GRAD_ELEMENTS
from spallm_kernels.triton import linear
from spallm_kernels.triton.tiles import DEQUANTIZE_UNITS, TABLE_GRAD, DecodeTile, decode_tile

from .operands import GROUPS, LARGE, LLAMA, random_input, random_sketches
from .timing import Bench, Call

LAYERS = (*LLAMA, LARGE)
Choice = dict[str, int]
#: Two contestants, "default" and "tried", on one layer; raises if a choice cannot be launched.
Trial = Callable[[Choice], dict[str, list[Call]]]

_DECODE = {
    "stages": (1, 2, 3, 4, 5),
    "columns": (64, 128, 256, 512),
    "slots": (1, 2, 4, 8, 16),
    "rows": (16, 32, 64),
    "registers": (64, 96, 128, 168, 255),
}
_DEQUANTIZE = {"rows": (2, 4, 8, 16, 32), "columns": (256, 512, 1024, 2048), "warps": (2, 4, 8)}
_TABLE_GRAD = {"rows": (1, 2, 4, 8, 16), "columns": (64, 128, 256, 512), "warps": (2, 4, 8)}


class Search(NamedTuple):
    """Describe what is varied, from which values, on one trial per layer."""

    fields: dict[str, tuple[int, ...]]
    default: Choice
    trials: Sequence[Trial]


def searches(
    kernels: Sequence[str], widths: Sequence[int], tokens: Sequence[int]
) -> Iterator[tuple[str, Callable[[Bench], Search]]]:
    """Yield all searches by name, the most important first; operands are made when one begins."""
    if "decode" in kernels:
        for bits in widths:
            for count in tokens:
                yield f"decode, {bits} bits, {count} tokens", partial(_decode, bits, count)
    for bits in widths:
        if "dequantize" in kernels:
            yield f"dequantize, {bits} bits", partial(_dequantize, bits)
        if "table_grad" in kernels:
            yield f"table_grad, {bits} bits", partial(_table_grad, bits)


def _decode(bits: int, tokens: int, bench: Bench) -> Search:
    generation = torch.cuda.get_device_capability()[0] if bench.has_gpu else 9
    trials, tiles = [], []
    for layer in LAYERS:
        x = random_input(bench, layer, tokens)
        tile = decode_tile(bits, tokens, x.shape[1], x.shape[1] // GROUPS, generation)
        operands = [(x, *sketch) for sketch in random_sketches(bench, layer, bits=bits)]
        trials.append(partial(_try_decode, operands, tile))
        tiles.append(tile)
    default = {name: value for name, value in asdict(tiles[0]).items() if name in _DECODE}
    return Search(_DECODE, default, trials)


def _try_decode(
    operands: list[tuple[Tensor, ...]], tile: DecodeTile, choice: Choice
) -> dict[str, list[Call]]:
    tile = replace(tile, **choice)
    return {
        "default": [partial(linear.decode, *tensors) for tensors in operands],
        "tried": [partial(linear.decode, *tensors, tile=tile) for tensors in operands],
    }


def _dequantize(bits: int, bench: Bench) -> Search:
    trials = []
    for layer in LAYERS:
        columns = bench.size(layer.in_features)
        sketches = random_sketches(bench, layer, bits=bits)
        trials.append(partial(_try_dequantize, [(*sketch, columns) for sketch in sketches]))
    return Search(_DEQUANTIZE, asdict(DEQUANTIZE_UNITS), trials)


def _try_dequantize(
    operands: list[tuple[Tensor, Tensor, int]], choice: Choice
) -> dict[str, list[Call]]:
    tile = replace(DEQUANTIZE_UNITS, **choice)
    return {
        "default": [partial(linear.dequantize, *tensors) for tensors in operands],
        "tried": [partial(linear.dequantize, *tensors, tile=tile) for tensors in operands],
    }


def _table_grad(bits: int, bench: Bench) -> Search:
    """Use one block of rows repeatedly: the product that makes it leaves it in the cache."""
    trials = []
    for layer in LAYERS:
        index_map, table = random_sketches(bench, layer, bits=bits)[0]
        rows = slice(0, GRAD_ELEMENTS // bench.size(layer.in_features))
        weight_grad = bench.randn(*index_map[rows].shape[:1], bench.size(layer.in_features))
        trials.append(partial(_try_table_grad, (weight_grad, index_map[rows], table[rows])))
    return Search(_TABLE_GRAD, asdict(TABLE_GRAD), trials)


def _try_table_grad(operands: tuple[Tensor, ...], choice: Choice) -> dict[str, list[Call]]:
    tile = replace(TABLE_GRAD, **choice)
    repeats = 20  # in a graph: one alone is as short as its launch
    return {
        "default": [partial(linear.table_grad, *operands)] * repeats,
        "tried": [partial(linear.table_grad, *operands, tile=tile)] * repeats,
    }
