"""Make random sketches, their dense weight by plain indexing, and results in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spallm_formats import pack
from spallm_kernels import hash_codes

#: Relative error against float64 that rounding inputs and results explains.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Sketch:
    codes: torch.Tensor
    index_map: torch.Tensor
    table: torch.Tensor  # float64, already rounded to the dtype it stands for
    hash_seed: int | None

    def dense(self, table=None):
        table = self.table if table is None else table
        rows, columns = self.codes.shape
        group = torch.arange(columns) // (columns // table.shape[1])
        return table[torch.arange(rows)[:, None], group, self.codes.long()]


def random_sketch(bits, groups, rows=9, columns=48, *, dtype=torch.float64, hash_seed=None):
    generator = torch.Generator().manual_seed(1000 * bits + 10 * groups + columns)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    index_map = torch.from_numpy(pack(codes.numpy(), bits))
    if hash_seed is not None:
        codes = torch.from_numpy(hash_codes(rows, columns, bits, hash_seed))
        index_map = torch.empty(rows, 0, dtype=torch.uint8)  # as a loaded layer has it
    table = torch.randn(rows, groups, 1 << bits, generator=generator, dtype=torch.float64)
    return Sketch(codes, index_map, table.to(dtype).double(), hash_seed)


def random(*shape, dtype=torch.float64, seed=0):
    """Return float64 values that `dtype` holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double()


def relative_error(found, expected):
    """Return the Frobenius norm of the difference relative to the expected; NaN if any value is."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def passes(function, x, table, bias, y_grad):
    """Return y and the gradients of x, table and bias, for a function of the three."""
    inputs = [tensor.clone().requires_grad_() for tensor in (x, table, bias)]
    y = function(*inputs)
    y.backward(y_grad)
    return [y.detach(), *(tensor.grad for tensor in inputs)]
