"""What the launches of all kernels share: options, dtypes, and packed codes as words."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import mix

_TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
#: Whether Triton runs in its interpreter, on CPU tensors.
INTERPRETED = not isinstance(mix, triton.runtime.JITFunction)
#: Neighbouring columns that a thread of an `mma` holds. Triton chooses the number from how the
#: operand is made, and treats a chain of joins differently since 3.8. Any value gives correct
#: results; a wrong one is slow.
K_PER_LANE = 4 if _TRITON < (3, 8) else 2
#: Whether marks of entries (`entry_sums.py`) stay in registers. Before Triton 3.6 they pass through
#: shared memory, which costs more than looking weights up.
KEEPS_MARKS = _TRITON >= (3, 6)
#: Set explicitly, because Triton's default is about to change.
OPTIONS = {"enable_fp_fusion": True}
HALVES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def packed_words(index_map: Tensor) -> Tensor:
    """Return an index map as 32-bit words. Stored maps are whole words already."""
    rows, row_bytes = index_map.shape
    if row_bytes % 4:
        index_map = torch.nn.functional.pad(index_map, (0, -row_bytes % 4))
    elif row_bytes == 0:  # hashed; an empty tensor of bytes cannot be viewed as words
        return index_map.new_empty(rows, 0, dtype=torch.int32)
    return index_map.contiguous().view(torch.int32)


def words_per_row(index_map: Tensor) -> int:
    """Return the words of a row of an index map."""
    return -(-index_map.shape[-1] // 4)


def new_result(x: Tensor, rows: int) -> Tensor:
    """Return a tensor for the products [tokens, rows]: the interpreter cannot round to 16 bits."""
    dtype = torch.float32 if INTERPRETED else x.dtype
    return torch.empty(x.shape[0], rows, dtype=dtype, device=x.device)


def register_limit(registers: int) -> dict[str, int]:
    """Return the option that limits registers, which Triton's compiler for AMD GPUs refuses."""
    return {"maxnreg": registers} if torch.version.hip is None else {}
