"""Define numba functions that multiply tokens with some rows of a sketched weight, tile by tile.

Compiled products call them for each block of rows, in parallel.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import torch
from torch import Tensor

from .conversions import add_bias, narrow, widen
from .tiles import add_rest, multiply_tile

#: Rows of a task for one thread: enough for the largest tiles.
ROWS = 16
#: The most inputs that one thread widens, as in torch.
_SHARE = 1 << 15
#: The most inputs of which every thread gets a copy.
OWN_INPUTS = _SHARE


# Numba copies the code to where it is called, so that constants stay constants.
@numba.njit(inline="always")
def multiply_rows(  # type: ignore[no-untyped-def]
    codes, code_stride, table, groups, width, seed, first, end, x, y, y_stride, tokens,
    unit, high, middle, low, tall, many, bits, kind, hashed
):  # fmt: skip
    """Multiply tokens with the rows from `first` to `end` of a sketched weight.

    The other arguments have the meaning of those of `multiply_tile`.

    Args:
        tokens: Number of tokens, int64.
        high: Rows of a tile with 1 token, a constant.
        middle: Rows of a tile with 2 tokens, a constant.
        low: Rows of a tile with 4 tokens, a constant.
        tall: Rows of a tile with more tokens, a constant.
        many: Their number, a constant.
    """
    x_stride = 4 * groups * width
    whole = end - (end - first) % 4
    token = 0
    token = _multiply_tiles(
        codes, code_stride, table, groups, width, seed, first, whole, x, y, y_stride, token, tokens,
        unit, bits, kind, hashed, tall, many
    )  # fmt: skip
    token = _multiply_tiles(
        codes, code_stride, table, groups, width, seed, first, whole, x, y, y_stride, token, tokens,
        unit, bits, kind, hashed, low, 4
    )  # fmt: skip
    token = _multiply_tiles(
        codes, code_stride, table, groups, width, seed, first, whole, x, y, y_stride, token, tokens,
        unit, bits, kind, hashed, middle, 2
    )  # fmt: skip
    token = _multiply_tiles(
        codes, code_stride, table, groups, width, seed, first, whole, x, y, y_stride, token, tokens,
        unit, bits, kind, hashed, high, 1
    )  # fmt: skip
    for row in range(whole, end):
        for token in range(tokens):
            multiply_tile(
                codes, code_stride, table, groups, width, seed, row,
                x + token * x_stride, y + token * y_stride, y_stride,
                unit, bits, kind, hashed, 1, 1
            )  # fmt: skip
    if width % 16:
        for row in range(first, end):
            for token in range(tokens):
                add_rest(
                    codes, code_stride, table, groups, width, seed, row,
                    x + token * x_stride, y + token * y_stride,
                    unit, bits, kind, hashed
                )  # fmt: skip


@numba.njit(inline="always")
def _multiply_tiles(  # type: ignore[no-untyped-def]
    codes, code_stride, table, groups, width, seed, first, end, x, y, y_stride, token, tokens,
    unit, bits, kind, hashed, rows, count
):  # fmt: skip
    """Multiply the tokens that fill tiles of a shape, and return the number of the next token.

    Args:
        token: Number of the first token, int64.
        rows: Rows of a tile, a constant.
        count: Tokens of a tile, a constant.
    """
    x_stride = 4 * groups * width
    while token + count <= tokens:
        for row in range(first, end, rows):
            multiply_tile(
                codes, code_stride, table, groups, width, seed, row,
                x + token * x_stride, y + token * y_stride, y_stride,
                unit, bits, kind, hashed, rows, count
            )  # fmt: skip
        token += count
    return token


def widened(x: Tensor, shares: int) -> tuple[Tensor, int]:
    """Return where a product reads its inputs in float32, and how many copies of them it makes.

    Few inputs are widened by every thread for itself: to fetch what another core has written would
    take longer. With 16 tokens of 1536 columns, a product took a third more time.

    Args:
        x: Inputs, float [tokens, in_features].
        shares: Number of threads.

    Returns:
        float32 [copies, tokens, in_features], not written yet, and the number of copies; x itself
        and 0 if it is float32.
    """
    if x.dtype == torch.float32:
        return x, 0
    copies = shares if x.numel() <= OWN_INPUTS else 1
    return x.new_empty(copies, *x.shape, dtype=torch.float32), copies


@numba.njit(inline="always")
def widen_once(x, wide, count, copies, kind):  # type: ignore[no-untyped-def]
    """Write the inputs as float32, if there is one copy of them for all threads.

    Args:
        x: Address of the inputs, int64.
        wide: Address of the copies, int64.
        count: Number of inputs, int64.
        copies: Number of copies, int64.
        kind: Kind of an input, a constant.
    """
    if copies == 1:
        if count <= _SHARE:
            widen(x, wide, count, kind)
        else:
            for share in numba.prange((count + _SHARE - 1) // _SHARE):
                start = share * _SHARE
                widen(x + 2 * start, wide + 4 * start, min(_SHARE, count - start), kind)


@numba.njit(inline="always")
def own_inputs(x, wide, count, copies, share, kind):  # type: ignore[no-untyped-def]
    """Return the address of the inputs in float32 for a thread, which writes a copy of its own.

    Args:
        share: Number of the thread, int64. The other arguments are those of `widen_once`.
    """
    own = wide
    if copies > 1:
        own = wide + 4 * count * share
        widen(x, own, count, kind)
    return own


@numba.njit(inline="always")
def finish_rows(  # type: ignore[no-untyped-def]
    sums, bias, y, rows, first, end, tokens, kind
):  # fmt: skip
    """Add the bias to the sums of some rows, and round them.

    Args:
        sums: Address of the sums, float32 [tokens, rows], int64.
        bias: Address of the bias, [rows], int64; 0 if there is none.
        y: Address of the results, [tokens, rows], int64; that of the sums if they are float32.
        rows: Number of rows, int64.
        first: Number of the first row, int64.
        end: Number of the row behind the last one, int64.
        tokens: Number of tokens, int64.
        kind: Kind of the bias and the results, a constant.
    """
    size = 4 if kind == "float32" else 2
    for token in range(tokens):
        place = token * rows + first
        if bias != 0:
            add_bias(sums + 4 * place, bias + size * first, end - first, kind)
        narrow(sums + 4 * place, y + size * place, end - first, kind)


def compiled(function: Callable[..., None], parallel: bool) -> Callable[..., None]:
    """Return a compiled function, with a name of its own for parallel code.

    Numba's cache on disk knows a function by its name and code, not by its options: it would load
    parallel code for small products, or code for one thread for large ones.
    """
    function.__qualname__ += "_parallel" if parallel else "_serial"
    return numba.njit(cache=True, parallel=parallel, nogil=True)(function)
