"""Run the Triton kernels without assembly, on GPUs that are not NVIDIA's or where `ptx.py` fails.

For few tokens, weights are looked up by `tl.gather`. The dense weight is read from the tables in
memory. Compiled for compute capability 9.0, decoding one token takes 5 instructions per weight at 4
bits and 11 to 13 at 3 and 2, where the byte permutes take 2.5 to 3.5. The kernels are compiled for
NVIDIA and AMD GPUs in the tests. Of devices, they have been run on NVIDIA's only.
"""

from __future__ import annotations

import functools

from torch import Tensor

from . import launching, linear
from .tiles import PORTABLE_DECODE_TOKENS

INTERPRETED = launching.INTERPRETED
decode = functools.partial(linear.decode, portable=True)
dequantize = functools.partial(linear.dequantize, portable=True)
table_grad = linear.table_grad  # has no assembly


def can_decode(x: Tensor, table: Tensor) -> bool:
    """Return whether `decode` supports the tensors: as in `linear.py`, but for fewer tokens."""
    return x.shape[0] <= PORTABLE_DECODE_TOKENS and linear.can_decode(x, table)


def decode_tokens(x: Tensor, table: Tensor, *, hashed: bool) -> float:
    """Return the most tokens for which `decode` is the faster path."""
    return PORTABLE_DECODE_TOKENS
