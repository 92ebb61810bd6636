"""Run kernels with every tensor next to a page that must not be touched: a program of its own.

    python guard_pages.py UNIT            run everything on a vector unit
    python guard_pages.py beyond|before   touch the byte behind or before a tensor, which must fail

Inputs, outputs and the copies in between lie at the end of their pages, and then at the start. So
a read or write outside of them ends this program with a signal. It prints what it does, before it
does it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from functools import partial

import numpy as np
import torch

from helpers.sketches import random, random_sketch
from spallm_kernels.cpu import bins, matrix, panels, vectorized
from spallm_kernels.cpu.vector_units import CHOICE

_PAGE = mmap.PAGESIZE
_NO_ACCESS = 0  # PROT_NONE
_EMPTY, _ZEROS, _CONTIGUOUS = torch.empty, torch.zeros, torch.Tensor.contiguous
_LIBRARY = ctypes.CDLL(None, use_errno=True)
_LIBRARY.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int

#: Rows, columns, groups and tokens of products: odd streams, a last step, no whole step, tiles.
PRODUCTS = [(5, 47, 1, 1), (7, 5, 1, 3), (17, 32, 4, 7), (1, 1, 1, 2), (6, 80, 2, 4)]
#: The same for gradients, which need groups of whole panels.
GRADIENTS = [(1, 64, 1, 1), (25, 512, 2, 7), (67, 64, 1, 5)]
#: Dtypes of tables by bits, as in `test_vectorized.py`, whose kernels are then in numba's cache.
DTYPES = {4: torch.float32, 3: torch.float16, 2: torch.bfloat16}
HASHED_DTYPES = {4: torch.bfloat16, 3: torch.float32, 2: torch.float16}
SEED = 5


class Guarded:
    """Make tensors that lie at the end or at the start of their pages."""

    def __init__(self, at_end: bool) -> None:
        self._at_end = at_end
        self._kept: list[mmap.mmap] = []  # torch.frombuffer keeps a buffer, but no guards

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return a tensor, like `torch.empty`."""
        shape = tuple(shape[0]) if not isinstance(shape[0], int) else shape
        count = int(np.prod(shape))
        if count == 0:
            return _EMPTY(shape, dtype=dtype)
        size = count * dtype.itemsize
        inside = -(-size // _PAGE) * _PAGE
        memory = mmap.mmap(-1, inside + 2 * _PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (address, address + _PAGE + inside):
            if _LIBRARY.mprotect(guard, _PAGE, _NO_ACCESS):
                raise OSError(ctypes.get_errno(), "mprotect")
        self._kept.append(memory)
        offset = _PAGE + (inside - size if self._at_end else 0)
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).reshape(shape)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.empty(*shape, dtype=dtype).zero_()

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def __enter__(self) -> Guarded:
        """Let the kernels' outputs and copies lie there too."""
        torch.empty, torch.zeros = self.empty, self.zeros
        torch.Tensor.new_empty = lambda tensor, *shape, dtype=None: self.empty(
            *shape, dtype=dtype or tensor.dtype
        )
        torch.Tensor.contiguous = lambda tensor: self.copy(_CONTIGUOUS(tensor))
        return self

    def __exit__(self, *error: object) -> None:
        torch.empty, torch.zeros = _EMPTY, _ZEROS
        torch.Tensor.contiguous = _CONTIGUOUS
        del torch.Tensor.new_empty


def run_kernels(guarded: Guarded, bits: int) -> None:
    """Run every kernel for a number of bits, and compare results with those in other memory."""

    def compare(name: str, function, *tensors: torch.Tensor) -> None:
        print(name, [tuple(tensor.shape) for tensor in tensors], flush=True)
        expected = function(*tensors)
        copies = [guarded.copy(tensor) for tensor in tensors]
        with guarded:
            found = function(*copies)
        assert torch.equal(found, expected)

    for rows, columns, groups, tokens in PRODUCTS:
        for seed, dtype in ((None, DTYPES[bits]), (SEED, HASHED_DTYPES[bits])):
            sketch = random_sketch(bits, groups, rows, columns, hash_seed=seed)
            x, index_map, table = random(tokens, columns).float(), sketch.index_map, sketch.table
            assert vectorized.supports(table.float(), columns, seed)
            compare("decode", partial(_decode, seed), x, index_map, table.to(dtype))
            half, half_table = x.bfloat16(), table.bfloat16()
            if matrix.supports(half, half_table, seed):
                compare("matrix", matrix.decode, half, index_map, half_table)
            # Hashed codes are looked up by the same code. A kernel takes a second to compile.
            for moved in (torch.float32, torch.float16) if seed is None else ():
                compare("dequantize", partial(_dequantize, columns), index_map, table.to(moved))
    for rows, columns, groups, tokens in GRADIENTS:
        sketch = random_sketch(bits, groups, rows, columns)
        index_map, table = sketch.index_map, sketch.table.float()
        y_grad, x, weight_grad = (
            random(tokens, rows),
            random(tokens, columns),
            random(rows, columns),
        )
        y_grad, x, weight_grad = y_grad.float(), x.float(), weight_grad.float()
        compare("input_grad", partial(_input_grad, columns), y_grad, index_map, table)
        compare("table_grad", panels.table_grad, y_grad, x, index_map, table)
        compare("bins", bins.table_grad, weight_grad, index_map, table)


def _decode(seed, x, index_map, table):
    return vectorized.decode(x, index_map, table, seed)


def _dequantize(columns, index_map, table):
    return vectorized.dequantize(index_map, table, columns, None, 0)


def _input_grad(columns, y_grad, index_map, table):
    return panels.input_grad(y_grad, index_map, table, columns)


def main(what: str) -> None:
    if what in ("beyond", "before"):
        tensor = Guarded(what == "beyond").zeros(5, dtype=torch.uint8)
        for place in (4, 5) if what == "beyond" else (0, -1):
            print(f"byte {place} of 5", flush=True)
            ctypes.string_at(tensor.data_ptr() + place, 1)
        return
    os.environ[CHOICE] = what
    for bits in (2, 3, 4):
        for at_end in (True, False):
            print(f"{bits} bits, tensors at the {'end' if at_end else 'start'}", flush=True)
            run_kernels(Guarded(at_end), bits)
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
