"""Launch the kernels of the sketched linear layer on a GPU.

The functions have the signatures and meanings of those in `reference/linear.py`. Tensors on the CPU
are accepted under Triton's interpreter. The interpreter has no byte permutes and no bfloat16
arithmetic, so there tables are looked up by `tl.gather` in float32. `portable` calls use no byte
permutes either (see `portable.py`).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import decode_kernel
from .dequantize import dequantize_any_kernel, dequantize_units_kernel
from .device import on
from .ptx import UNIT_CODES, UNIT_WORDS
from .table_grad import table_grad_kernel
from .tiles import (
    ALIGNMENT,
    DECODE_TOKENS,
    DEQUANTIZE_ANY,
    DEQUANTIZE_UNITS,
    HASHED_DECODE_TOKENS,
    TABLE_GRAD,
    BlockTile,
    DecodeTile,
    decode_tile,
    portable_decode_tile,
    table_span,
)

#: Whether Triton runs in its interpreter, on CPU tensors.
INTERPRETED = not isinstance(decode_kernel, triton.runtime.JITFunction)
#: Neighbouring columns that a thread of an `mma` holds. Triton chooses the number from how the
#: operand is made, and treats a chain of joins differently since 3.8. Any value gives correct
#: results; a wrong one is slow.
_K_PER_LANE = 4 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 2
#: Set explicitly, because Triton's default is about to change.
_OPTIONS = {"enable_fp_fusion": True}
_HALVES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_INTEGER_OF_BYTES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def can_decode(x: Tensor, table: Tensor) -> bool:
    """Return whether `decode` supports the tensors.

    It needs few tokens in 16 bits, 2 to 4 bits per code, and groups of whole units.
    """
    (tokens, columns), groups = x.shape, table.shape[1]
    return (
        0 < tokens <= DECODE_TOKENS
        and x.dtype in _HALVES
        and table.shape[-1].bit_length() - 1 in UNIT_CODES
        and columns // groups % ALIGNMENT == 0
    )


def decode_tokens(x: Tensor, table: Tensor, *, hashed: bool) -> float:
    """Return the most tokens for which `decode` is the faster path."""
    return HASHED_DECODE_TOKENS if hashed else DECODE_TOKENS


def decode(
    x: Tensor,
    index_map: Tensor,
    table: Tensor,
    bias: Tensor | None = None,
    *,
    hash_seed: int | None = None,
    tile: DecodeTile | None = None,
    portable: bool = False,
) -> Tensor:
    """Compute y = x W^T + bias without a dense weight.

    Args:
        x: float16 or bfloat16 [tokens, in_features], at most DECODE_TOKENS tokens (see `tiles.py`).
        index_map: Packed codes, uint8 [out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables, any float [out_features, groups, 2^bits], rounded to the dtype of x.
        bias: Float [out_features], or None.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        tile: Share of one program; by default the measured one.
        portable: Whether to look weights up by `tl.gather`, without assembly.

    Returns:
        y [tokens, out_features], in the dtype of x.
    """
    (tokens, columns), (rows, groups, entries) = x.shape, table.shape
    if tile is None:
        sizes = entries.bit_length() - 1, tokens, columns, columns // groups
        tile = choose_tile(*sizes, index_map, hashed=hash_seed is not None, portable=portable)
    operands = x, index_map, table, bias, rows
    return launch_decode(*operands, hash_seed, tile, one=tokens == 1, portable=portable)


def choose_tile(
    bits: int,
    tokens: int,
    columns: int,
    width: int,
    index_map: Tensor,
    *,
    hashed: bool,
    portable: bool,
) -> DecodeTile:
    """Return the tile of the decode kernel on the device of an index map.

    Args:
        bits: Bits of a code, 2 to 4.
        tokens: Number of inputs.
        columns: Columns of the layer.
        width: Columns of a group.
        index_map: Packed codes, uint8 [..., row_bytes].
        hashed: Whether codes are computed, not stored.
        portable: Whether weights are looked up without assembly.
    """
    if portable:
        return _portable_tile(tokens, columns, width)
    generation, aligned = _generation(index_map.device), _row_words(index_map) % 4 == 0
    return _tile(bits, tokens, columns, width, generation, hashed=hashed, aligned=aligned)


def launch_decode(
    x: Tensor,
    index_map: Tensor,
    table: Tensor,
    bias: Tensor | None,
    rows: int,
    hash_seed: int | None,
    tile: DecodeTile,
    *,
    one: bool,
    portable: bool,
    offsets: Tensor | None = None,
    blocks: int = 1,
    tables: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Launch the decode kernel for one weight, for those of experts, or for sets of tables.

    Args:
        x: float16 or bfloat16 [tokens, in_features].
        index_map: Packed codes, uint8 [all rows, row_bytes]; ignored with `hash_seed`.
        table: Tables, any float [all rows, groups, 2^bits], rounded to the dtype of x.
        bias: Float [rows], or None.
        rows: Rows of a weight.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        tile: Share of one program.
        one: Whether a program has one token, not `tile.tokens`.
        portable: Whether to look weights up by `tl.gather`, without assembly.
        offsets: Tokens of each expert (see `expert_blocks.py`); None if there is one weight.
        blocks: Blocks of tokens, each of one expert or set.
        tables: Tables of the sets behind the first one, float [slots, rows, groups, 2^bits] in the
            dtype of `table`; None if tokens have no sets.
        order: Tokens sorted by set, int [tokens]; `offsets` then counts in this order.

    Returns:
        y [tokens, rows], in the dtype of x.
    """
    (tokens, columns), (all_rows, groups, entries) = x.shape, table.shape
    bits, width = entries.bit_length() - 1, columns // groups
    experts = 0 if offsets is None else all_rows // rows
    if tables is not None:
        experts = 1 + tables.shape[0]
        tables = (tables.to(x.dtype) if INTERPRETED else tables).contiguous()
    words, row_words = _words(index_map), _row_words(index_map)
    quad = 4 if tile.quads else 1
    codes = quad * UNIT_CODES[bits]
    # The interpreter truncates to bfloat16 instead of rounding, so torch rounds the table first.
    table = table.to(x.dtype) if INTERPRETED else table
    exact = torch.float32 if INTERPRETED else x.dtype
    y = torch.empty(tokens, rows, dtype=exact, device=x.device)
    span = table_span(columns, width, tile.slots)
    grid = triton.cdiv(rows, tile.rows), blocks
    with on(x.device):
        # Programs of the same rows run one after another if they share codes.
        decode_kernel[grid if tables is None else grid[::-1]](
            x.contiguous(),
            words,
            table.contiguous(),
            tables,
            None if bias is None else bias.contiguous(),
            y,
            offsets,
            order,
            tokens,
            rows,
            columns,
            row_words,
            width,
            span,
            hash_seed or 0,
            BITS=bits,
            CODES=codes,
            WORDS=quad * UNIT_WORDS[bits],
            HASHED=hash_seed is not None,
            HAS_BIAS=bias is not None,
            EXPERTS=experts,
            SETS=tables is not None,
            PADDED=triton.next_power_of_2(experts + 1),
            EVEN=span % tile.columns == 0,
            WORD_ALIGN=4 if row_words % 4 == 0 and span * bits % 128 == 0 else 1,
            ASM=not (INTERPRETED or portable),
            DTYPE=tl.float32 if INTERPRETED else _HALVES[x.dtype],
            K_PER_LANE=_K_PER_LANE,
            SLOTS=tile.slots,
            ROWS=tile.rows,
            UNITS=tile.columns // codes,
            TOKENS=tile.tokens,
            ONE=one,
            STAGES=tile.stages,
            num_warps=tile.slots,
            **_register_limit(tile.registers),
            **_OPTIONS,
        )
    return y.to(x.dtype) if INTERPRETED else y


def dequantize(
    index_map: Tensor,
    table: Tensor,
    in_features: int,
    *,
    hash_seed: int | None = None,
    first_row: int = 0,
    tile: BlockTile | None = None,
    portable: bool = False,
) -> Tensor:
    """Return the dense weight of a sketch.

    Args:
        index_map: Packed codes, uint8 [out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables, float [out_features, groups, 2^bits].
        in_features: Columns of the weight.
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        first_row: Number of the first row in the module, for the hash.
        tile: Share of one program; by default the measured one.
        portable: Whether to read every weight from the table in memory, without assembly.

    Returns:
        The weight [out_features, in_features], in the dtype of the table.
    """
    rows, groups, entries = table.shape
    bits, width = entries.bit_length() - 1, in_features // groups
    weight = torch.empty(rows, in_features, dtype=table.dtype, device=table.device)
    words, row_words = _words(index_map), _row_words(index_map)
    sizes = (rows, in_features, row_words, width, first_row, hash_seed or 0)
    hashed = hash_seed is not None
    in_units = bits in UNIT_CODES and table.dtype in _HALVES and width % ALIGNMENT == 0
    with on(table.device):
        if in_units and not portable:
            tile = tile or DEQUANTIZE_UNITS
            dequantize_units_kernel[(triton.cdiv(rows, tile.rows), groups)](
                words,
                table.contiguous(),
                weight,
                *sizes,
                BITS=bits,
                CODES=UNIT_CODES[bits],
                WORDS=UNIT_WORDS[bits],
                HASHED=hashed,
                ASM=not INTERPRETED,
                ROWS=tile.rows,
                UNITS=tile.columns // UNIT_CODES[bits],
                num_warps=tile.warps,
                **_OPTIONS,
            )
        else:
            integers = _INTEGER_OF_BYTES[table.element_size()]
            tile = tile or DEQUANTIZE_ANY
            grid = (triton.cdiv(rows, tile.rows), triton.cdiv(in_features, tile.columns))
            dequantize_any_kernel[grid](
                words,
                table.contiguous().view(integers),
                weight.view(integers),
                *sizes,
                BITS=bits,
                HASHED=hashed,
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                num_warps=tile.warps,
                **_OPTIONS,
            )
    return weight


def table_grad(
    weight_grad: Tensor,
    index_map: Tensor,
    table: Tensor,
    *,
    hash_seed: int | None = None,
    first_row: int = 0,
    tile: BlockTile = TABLE_GRAD,
) -> Tensor:
    """Return the gradient of the tables, given the gradient of the dense weight.

    Args:
        weight_grad: Float [out_features, in_features].
        index_map: Packed codes, uint8 [out_features, row_bytes]; ignored with `hash_seed`.
        table: Tables, float [out_features, groups, 2^bits].
        hash_seed: Seed of the `hash` mapping, whose codes are computed; None if codes are stored.
        first_row: Number of the first row in the module, for the hash.
        tile: Share of one program; by default the measured one.

    Returns:
        The gradient in the shape of the table: for each entry the sum over the weights that use it,
        in float32 or wider.
    """
    rows, groups, entries = table.shape
    columns = weight_grad.shape[1]
    wide = torch.promote_types(weight_grad.dtype, torch.float32)
    sums = torch.empty(table.shape, dtype=wide, device=table.device)
    words, row_words = _words(index_map), _row_words(index_map)
    with on(table.device):
        table_grad_kernel[(triton.cdiv(rows, tile.rows), groups)](
            words,
            weight_grad.contiguous(),
            sums,
            rows,
            columns,
            row_words,
            columns // groups,
            first_row,
            hash_seed or 0,
            BITS=entries.bit_length() - 1,
            HASHED=hash_seed is not None,
            WIDE=tl.float64 if wide == torch.float64 else tl.float32,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
            **_OPTIONS,
        )
    return sums


def _words(index_map: Tensor) -> Tensor:
    """Return an index map as 32-bit words. Stored maps are whole words already."""
    rows, row_bytes = index_map.shape
    if row_bytes % 4:
        index_map = torch.nn.functional.pad(index_map, (0, -row_bytes % 4))
    elif row_bytes == 0:  # hashed; an empty tensor of bytes cannot be viewed as words
        return index_map.new_empty(rows, 0, dtype=torch.int32)
    return index_map.contiguous().view(torch.int32)


def _row_words(index_map: Tensor) -> int:
    """Return the words of a row of an index map."""
    return -(-index_map.shape[-1] // 4)


def _register_limit(registers: int) -> dict[str, int]:
    """Return the option that limits registers, which Triton's compiler for AMD GPUs refuses."""
    return {"maxnreg": registers} if torch.version.hip is None else {}


#: Tiles depend on a few numbers per layer, and computing one takes half as long as a launch.
_tile = functools.lru_cache(maxsize=1024)(decode_tile)
_portable_tile = functools.lru_cache(maxsize=1024)(portable_decode_tile)


@functools.cache
def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
