"""Compile every kernel for a GPU generation and print the results as JSON.

This is a separate program, because Triton decides whether to interpret kernels when it defines
them.

    python tests/helpers/compile_report.py 90
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.compiled import compile_launch, count, disassemble, loop, recorded
from spallm_kernels.batched.compensate import BLOCK
from spallm_kernels.triton import (
    compensate,
    decode,
    descend,
    entry_sums,
    experts,
    linear,
    set_blocks,
    tenants,
)
from spallm_kernels.triton.launching import KEEPS_MARKS

KERNELS = (
    (decode, "decode_kernel"),
    (linear, "dequantize_units_kernel", "dequantize_any_kernel", "table_grad_kernel"),
    (entry_sums, "entry_sums_kernel"),
    (set_blocks, "sort_tokens_kernel"),
    (compensate, "compensate_kernel"),
    (descend, "descend_kernel"),
)
ROWS, COLUMNS, GROUPS = 4096, 4096, 4
EXPERTS = 64
#: Tokens of all experts, by tokens of a program.
EXPERTS_TOKENS = {1: 8, 8: 4 * EXPERTS, 64: 32 * EXPERTS}
SLOTS = 15
#: Bits, tokens of a program, and tokens of all sets of tables.
TENANTS = ((4, 1, 1), (4, 8, 8), (4, 16, 16), (4, 64, 512), (3, 16, 16), (2, 16, 16))
#: Tokens of a program that sums inputs by table entry.
SUMS_TOKENS = (8, 16, 32)


def main() -> None:
    capability = int(sys.argv[1])
    decode._generation = lambda device: capability // 10  # tiles follow the GPU
    found = {}
    with contextlib.ExitStack() as stack:
        recordings = [stack.enter_context(recorded(*kernels)) for kernels in KERNELS]
        for name, call in cases().items():
            call()
            launches = {launch.kernel.__name__: launch for each in recordings for launch in each}
            # Sets of tables take three launches; the first sorts the tokens.
            several = {"tenants": "decode_kernel", "sums": "entry_sums_kernel"}
            kernel = several.get(name.partition(",")[0])
            (launch,) = launches.values() if kernel is None else (launches[kernel],)
            found[name] = compile_launch(launch, capability), launch.options
            for each in recordings:
                each.clear()
    disassembled = disassemble([code for code, _ in found.values()], capability)
    report = {
        name: describe(code, instructions, options)
        for (name, (code, options)), instructions in zip(found.items(), disassembled, strict=True)
    }
    json.dump(report, sys.stdout, indent=1)


def cases():
    """Return launches by name: each width, number of tokens, source of codes, dtype and step."""
    found = {}
    for bits in (2, 3, 4):
        for tokens in (1, 2, 16, 32, 64):
            found[f"decode, {bits} bits, {tokens} tokens"] = decode_layer(bits, tokens)
        for tokens in (1, 16):
            found[f"decode, {bits} bits, {tokens} tokens, hashed"] = decode_layer(
                bits, tokens, hash_seed=7
            )
        found[f"decode, {bits} bits, ragged"] = decode_layer(bits, 1, columns=4000, groups=1)
        found[f"decode, {bits} bits, float16 and float32 tables"] = decode_layer(
            bits, 1, dtype=torch.float16, table_dtype=torch.float32
        )
        for size, tokens in EXPERTS_TOKENS.items():
            found[f"experts, {bits} bits, {size} tokens"] = decode_experts(bits, tokens)
        found[f"experts, {bits} bits, 1 tokens, hashed"] = decode_experts(
            bits, EXPERTS_TOKENS[1], hash_seed=7
        )
        found[f"dequantize, {bits} bits"] = dequantize(bits, torch.bfloat16)
        found[f"dequantize, {bits} bits, hashed"] = dequantize(bits, torch.bfloat16, hash_seed=7)
        found[f"dequantize, {bits} bits, float32"] = dequantize(bits, torch.float32)
        found[f"table_grad, {bits} bits"] = table_grad(bits)
        found[f"compensate, {bits} bits"], found[f"descend, {bits} bits"] = columns(bits)
        for tokens in SUMS_TOKENS if KEEPS_MARKS else ():
            found[f"sums, {bits} bits, {tokens} tokens"] = decode_tenants(bits, tokens)
        if KEEPS_MARKS:
            found[f"sums, {bits} bits, 16 tokens, hashed"] = decode_tenants(bits, 16, hash_seed=7)
    for bits, size, tokens in TENANTS:
        found[f"tenants, {bits} bits, {size} tokens"] = decode_tenants(bits, tokens)
    found["tenants, 4 bits, 16 tokens, hashed"] = decode_tenants(4, 16, hash_seed=7)
    sets = torch.empty(512, dtype=torch.int64)
    found["sort tokens"] = lambda: set_blocks.sort_tokens(sets, SLOTS)
    return found


def decode_layer(
    bits,
    tokens,
    *,
    columns=COLUMNS,
    groups=GROUPS,
    dtype=torch.bfloat16,
    table_dtype=None,
    hash_seed=None,
):
    x = torch.empty(tokens, columns, dtype=dtype)
    index_map, table = sketch(bits, columns, groups, table_dtype or dtype)
    return lambda: linear.decode(x, index_map, table, hash_seed=hash_seed)


def decode_experts(bits, tokens, *, hash_seed=None):
    index_map, table = sketch(bits, COLUMNS, GROUPS, torch.bfloat16)
    shape, offsets = (EXPERTS, ROWS // EXPERTS), torch.empty(EXPERTS + 1, dtype=torch.int32)
    x = torch.empty(tokens, COLUMNS, dtype=torch.bfloat16)
    stacked = index_map.unflatten(0, shape), table.unflatten(0, shape)
    return lambda: experts.decode(x, offsets, *stacked, hash_seed=hash_seed)


def decode_tenants(bits, tokens, *, hash_seed=None):
    index_map, table = sketch(bits, COLUMNS, GROUPS, torch.bfloat16)
    x, sets = (
        torch.empty(tokens, COLUMNS, dtype=torch.bfloat16),
        torch.empty(tokens, dtype=torch.int64),
    )
    tables = torch.empty(SLOTS, *table.shape, dtype=table.dtype)
    return lambda: tenants.decode(x, sets, index_map, table, tables, hash_seed=hash_seed)


def dequantize(bits, dtype, *, hash_seed=None):
    index_map, table = sketch(bits, COLUMNS, GROUPS, dtype)
    return lambda: linear.dequantize(index_map, table, COLUMNS, hash_seed=hash_seed)


def table_grad(bits):
    index_map, table = sketch(bits, COLUMNS, GROUPS, torch.float32)
    weight_grad = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)
    return lambda: linear.table_grad(weight_grad, index_map, table)


def columns(bits):
    """Return the column loops of both steps of calibration, for the first block."""
    rows, square = torch.empty(ROWS, COLUMNS), torch.empty(COLUMNS, COLUMNS)
    tables = tuple(torch.empty(ROWS, GROUPS, entries) for entries in (1 << bits, (1 << bits) - 1))
    codes, order = rows.to(torch.uint8), torch.empty(COLUMNS, dtype=torch.int64)
    return (
        lambda: compensate.compensate_block(rows, *tables, order, square, rows, codes, 0, BLOCK),
        lambda: descend.descend_block(*tables, codes, rows, rows, square, 0, BLOCK),
    )


def sketch(bits, columns, groups, dtype):
    row_bytes = -(-columns * bits // 128) * 16
    index_map = torch.empty(ROWS, row_bytes, dtype=torch.uint8)
    return index_map, torch.empty(ROWS, groups, 1 << bits, dtype=dtype)


def describe(code, instructions, options):
    facts = {
        "registers": code.registers,
        "spilled_bytes": code.spilled_bytes,
        "shared_bytes": code.shared_bytes,
        "warps": options["num_warps"],
    }
    if "SLOTS" in options:
        inner = loop(instructions, "HMMA")
        weights = options["ROWS"] * options["UNITS"] * options["CODES"] / 32  # of a thread
        if "EXPERTS" not in options:  # the kernel of sums: a row has a line for each entry
            weights *= 2 ** options["BITS"]
        facts |= {
            "instructions_per_weight": len(inner) / weights,
            "permutes_per_weight": count(inner, "PRMT") / weights,
            "shared_stores_in_loop": count(inner, "STS"),
            "narrow_loads_in_loop": count(inner, "LDGSTS")
            - sum(".128" in text for text in inner if "LDGSTS" in text),
        }
    return facts


if __name__ == "__main__":
    main()
